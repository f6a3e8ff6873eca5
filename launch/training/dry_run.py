"""``cinemesh train CONFIG --dry-run``: what a run would be on so many devices. Starts nothing, writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import CinemeshError
from ...model.config import latent_text
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.footprint import Footprint
from ...perf_model.prices.played import PlayedStep
from ...perf_model.report.explain import describe, mfu
from ..tables import new_console, plain_table
from .predict import check_memory, play_buckets
from .recipe import read_recipe
from .resolve import cluster_under, planned
from .setting import Setting

NUMBERS = ("tokens", "share", "samples a rank", "step s", "tokens/s", "MFU", "peak GB")


@dataclass(frozen=True)
class BucketStep:
    """A step of one bucket. ``share``: of the run's steps. ``samples``: of a data rank's micro-batch."""

    latent: str
    tokens: int
    share: float
    samples: int
    micro_batches: int
    step_s: float
    tokens_per_s: float
    mfu: float
    peak_bytes: int


def run(*, config: Path, ranks: int | None, overrides: Sequence[str], as_json: bool) -> None:
    """Print the recipe's plan, its bytes, and what the cost model says of a step of every bucket.

    Raises CinemeshError where training would refuse the recipe on so many devices: no plan that fits, or not the given
    one; and for a recipe that names no cluster.
    """
    recipe, auto = read_recipe(config, overrides)
    if recipe.cluster is None:
        raise CinemeshError(
            f"{config}: it names no cluster to price its steps on", remedy="add --set cluster=grand-teton-h100"
        )
    setting, cluster = Setting.of(recipe), cluster_under(recipe, recipe.cluster)
    if auto is not None:
        if ranks is None:
            raise CinemeshError(f"{config}: its plan is auto", remedy="say for how many devices: --ranks 6144")
        setting = setting.under(planned(ranks, auto, setting).plan)
    elif ranks is not None:
        recipe.plan.check_world_size(ranks)
    told = _told(setting, cluster)
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        _print(setting, told)


def _told(setting: Setting, cluster: Cluster) -> dict[str, Any]:
    plan, schedule, data = setting.config.plan, setting.config.schedule, setting.config.data
    total = sum(bucket.weight for bucket in data.shapes)
    buckets: list[BucketStep] = []
    footprints: list[Footprint] = []
    for bucket, step in zip(data.shapes, play_buckets(setting, cluster), strict=True):
        check_memory(step, cluster)
        buckets.append(_bucket(setting, cluster, step, bucket.weight / total))
        footprints.append(step.footprint)
    step_s = sum(bucket.share * bucket.step_s for bucket in buckets)
    most = max(footprints, key=lambda footprint: footprint.peak_bytes)
    hours = step_s * schedule.steps / 3600.0
    return {
        "predicted": True,
        "model": setting.model.name,
        "cluster": cluster.name,
        "ranks": plan.world_size,
        "plan": plan.to_dict(),
        "global_batch": data.global_batch,
        "buckets": [asdict(bucket) for bucket in buckets],
        "step_s": step_s,
        "peak_bytes": most.peak_bytes,
        "limit_bytes": most.limit_bytes,
        "bytes": most.by_class,
        "steps": schedule.steps,
        "hours": hours,
        "device_hours": hours * plan.world_size,
    }


def _bucket(setting: Setting, cluster: Cluster, step: PlayedStep, share: float) -> BucketStep:
    latent = step.batch.latent
    tokens = setting.model.tokens(latent)
    return BucketStep(
        latent=latent_text(latent),
        tokens=tokens,
        share=share,
        samples=step.batch.samples,
        micro_batches=step.plan.micro_batches,
        step_s=step.step_s,
        tokens_per_s=step.samples * tokens / step.step_s,
        mfu=mfu(step, cluster),
        peak_bytes=step.footprint.peak_bytes,
    )


def _print(setting: Setting, told: dict[str, Any]) -> None:
    console, plan = new_console(), setting.config.plan
    console.print(
        f"{told['model']} on {told['ranks']:,} devices of {told['cluster']}, a global batch of "
        f"{told['global_batch']:,}. Predicted, not measured; nothing was started or written.\n\n{describe(plan)}\n"
    )
    table = plain_table("bucket", *NUMBERS, right=NUMBERS)
    for bucket in told["buckets"]:
        many = f" x {bucket['micro_batches']}" if bucket["micro_batches"] > 1 else ""
        table.add_row(
            bucket["latent"],
            f"{bucket['tokens']:,}",
            f"{bucket['share']:.0%}",
            f"{bucket['samples']}{many}",
            f"{bucket['step_s']:.3g}",
            f"{bucket['tokens_per_s']:,.0f}",
            f"{bucket['mfu']:.1%}",
            f"{bucket['peak_bytes'] / 1e9:.2f}",
        )
    console.print(table)
    classes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in told["bytes"].items() if size >= 5e6)
    console.print(
        f"\nmost memory: {told['peak_bytes'] / 1e9:.2f} of {told['limit_bytes'] / 1e9:.2f} GB ({classes})\n"
        f"{told['steps']:,} steps of {told['step_s']:.3g} s: {told['hours']:,.3g} h, "
        f"{told['device_hours']:,.3g} device hours, without validation, checkpoints and restarts"
    )
