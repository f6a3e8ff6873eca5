"""From one run of a chain to the next: plans, batches, step times, and the neutral group that the new one stays in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...model.config import latent_text
from ...perf_model.report.explain import describe
from ...perf_model.report.landscape import FAMILIES, NeutralGroup, neutral_groups
from ...perf_model.search.planner import NEAR, search, survey
from ...perf_model.search.request import LatentBucket, Request
from ..training.predict import play_buckets
from ..training.recipe import Config
from ..training.resolve import cluster_under
from ..training.setting import Setting
from ..training.telemetry import read_metrics


def hand_over(before: Config, after: Config) -> list[str]:
    """What is said between two runs. With a cluster, steps and the group are predicted."""
    lines = [f"  {name}: {_told(config)}" for name, config in (("before", before), ("now", after))]
    if after.cluster is not None:
        lines.append(f"  neutral group (predicted): {_neutral(Setting.of(after))}")
    return lines


def _told(config: Config) -> str:
    """A run in a line."""
    batches = " + ".join(f"{n:,}" for n in dict.fromkeys(config.data.global_batches))
    told = f"{config.model.preset} under {describe(config.plan)}, batch {batches}, lr {config.optimizer.lr:.3g}"
    rows = [row["step_s"] for row in read_metrics(config.logging.directory) if "step_s" in row]
    if rows:
        told += f", {rows[-1]:.3g} s a step at its end (measured)"
    if config.cluster is not None:
        told += f", predicted {', '.join(_predicted(Setting.of(config)))}"
    return told


def _predicted(setting: Setting) -> Iterator[str]:
    assert setting.config.cluster is not None
    cluster = cluster_under(setting.config, setting.config.cluster)
    for step in play_buckets(setting, cluster):
        rate = step.samples / step.step_s
        yield f"{step.step_s:.3g} s a step of {latent_text(step.batch.latent)} ({rate:.3g} samples/s)"


def _neutral(setting: Setting) -> str:
    """Of the first bucket: other global batches on as many devices, of about as many samples/s."""
    config = setting.config
    assert config.cluster is not None
    batch = config.data.global_batches[0]
    request = Request(
        config=setting.model,
        buckets=(LatentBucket(setting.latents[0]),),
        cluster=cluster_under(config, config.cluster),
        gpus=config.plan.world_size,
        samples=setting.batches[0].samples,
        dtype=config.plan.dtype,
        shown=FAMILIES,
    )
    found = [search(replace(request, global_batch=batch)).best]
    for samples in (request.samples, 2 * request.samples):
        found += survey(replace(request, samples=samples)).choices
    groups = neutral_groups(found, NEAR)
    group = next((each for each in groups if batch in [choice.global_batch for choice in each.choices]), None)
    if group is None:
        return f"none: no other batch is within {NEAR:.0%} of the samples/s of {batch:,}"
    return _group(group)


def _group(group: NeutralGroup) -> str:
    by_batch = sorted(group.choices, key=lambda choice: choice.global_batch)
    return ", ".join(f"batch {c.global_batch:,} ({c.step_s:.3g} s, {c.samples_per_s:.3g} samples/s)" for c in by_batch)
