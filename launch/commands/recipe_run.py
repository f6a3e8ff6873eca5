"""What a run would be under a plan: a step of every bucket, its bytes, its hours, as records and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from ...model.config import ModelConfig, latent_text
from ...parallel.ir.plan import Plan
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.footprint import Footprint
from ...perf_model.prices.played import PlayedStep
from ...perf_model.report.explain import mfu
from ..tables import plain_table
from .reply import BucketStep, RecipeRun


@dataclass(frozen=True)
class Steps:
    """Of a run: how many, and in which proportion they are of each bucket, whose latents several may share."""

    count: int
    weights: Sequence[float]
    latents: Sequence[tuple[int, int, int]]


NUMBERS = ("tokens", "share", "samples a rank", "batch", "step s", "tokens/s", "MFU", "peak GB")


def recipe_run(
    config: ModelConfig, cluster: Cluster, plan: Plan, steps: Iterable[PlayedStep], load: Steps
) -> RecipeRun:
    """A run under a plan, from one whole step of every shape: played one after the other, for each is large."""
    shares: dict[tuple[int, int, int], float] = {}
    for latent, weight in zip(load.latents, load.weights, strict=True):
        shares[latent] = shares.get(latent, 0.0) + weight / sum(load.weights)
    buckets: list[BucketStep] = []
    footprints: list[Footprint] = []
    encoders_s = 0.0
    for step in steps:
        buckets.append(_bucket(config, cluster, step, shares[step.batch.latent]))
        footprints.append(step.footprint)
        encoders_s += shares[step.batch.latent] * (step.frozen.seconds if step.frozen else 0.0)
    step_s = sum(bucket.share * bucket.step_s for bucket in buckets)
    most = max(footprints, key=lambda footprint: footprint.peak_bytes)
    hours = step_s * load.count / 3600.0
    return RecipeRun(
        ranks=plan.world_size,
        plan=plan.to_dict(),
        global_batch=buckets[0].global_batch,
        buckets=buckets,
        step_s=step_s,
        encoders_s=encoders_s,
        peak_bytes=most.peak_bytes,
        limit_bytes=most.limit_bytes,
        bytes=most.by_class,
        steps=load.count,
        hours=hours,
        device_hours=hours * plan.world_size,
    )


def _bucket(config: ModelConfig, cluster: Cluster, step: PlayedStep, share: float) -> BucketStep:
    latent = step.batch.latent
    tokens = config.tokens(latent)
    return BucketStep(
        latent=latent_text(latent),
        tokens=tokens,
        share=share,
        samples=step.batch.samples,
        global_batch=step.samples,
        micro_batches=step.plan.micro_batches,
        step_s=step.step_s,
        tokens_per_s=step.samples * tokens / step.step_s,
        mfu=mfu(step, cluster),
        peak_bytes=step.footprint.peak_bytes,
    )


def encoders_told(encoders_s: float, step_s: float) -> str:
    """What text encoders in the loop cost."""
    return f"text encoders in the loop: {encoders_s:.3g} s of a step ({encoders_s / step_s:.2%}), all of it exposed"


def print_recipe_run(console: Console, run: RecipeRun) -> None:
    """The same as a table of the buckets and lines on memory and hours."""
    table = plain_table("bucket", *NUMBERS, right=NUMBERS)
    for bucket in run.buckets:
        many = f" x {bucket.micro_batches}" if bucket.micro_batches > 1 else ""
        table.add_row(
            bucket.latent,
            f"{bucket.tokens:,}",
            f"{bucket.share:.0%}",
            f"{bucket.samples}{many}",
            f"{bucket.global_batch:,}",
            f"{bucket.step_s:.3g}",
            f"{bucket.tokens_per_s:,.0f}",
            f"{bucket.mfu:.1%}",
            f"{bucket.peak_bytes / 1e9:.2f}",
        )
    console.print(table)
    if run.encoders_s:
        console.print(encoders_told(run.encoders_s, run.step_s))
    classes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in run.bytes.items() if size >= 5e6)
    console.print(
        f"\nmost memory: {run.peak_bytes / 1e9:.2f} of {run.limit_bytes / 1e9:.2f} GB ({classes})\n"
        f"{run.steps:,} steps of {run.step_s:.3g} s: {run.hours:,.3g} h, "
        f"{run.device_hours:,.3g} device hours, without validation, checkpoints and restarts"
    )
