"""What the cost model says of the steps of a run that is about to start.

Asked on rank 0, before the run has a mesh; the loop reads the answer from its file and never loads this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ...errors import CinemeshError
from ...model.config import latent_text
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.encoders import FrozenEncoder, LoopEncoders, frozen_options
from ...perf_model.prices.models import PriceModels
from ...perf_model.prices.played import PlayedStep, play_step
from .captions import encoded_in_loop
from .predicted import Predicted
from .setting import Setting


def loop_encoders(setting: Setting) -> LoopEncoders | None:
    """The text encoders that a recipe runs in its loop, of those with weights; None without any."""
    if not encoded_in_loop(setting.config):
        return None
    found = tuple(
        FrozenEncoder(encoder.name, encoder.layers, encoder.width, encoder.tokens, encoder.sharded)
        for encoder in setting.encoding.encoders
        if encoder.layers is not None
    )
    return LoopEncoders(found, setting.config.data.embedding_steps) if found else None


def play_buckets(setting: Setting, cluster: Cluster) -> Iterator[PlayedStep]:
    """The whole step of every shape of a recipe under its plan, played one after the other: each is large.

    Raises CinemeshError as ``batches`` does.
    """
    models, loop, plan = PriceModels.of(cluster), loop_encoders(setting), setting.config.plan
    for batch in setting.shapes:
        held = frozen_options(plan, loop, batch.samples * plan.micro_batches, models)[0] if loop else None
        marked, graphs = setting.marked(cluster.device), len(setting.shapes)
        yield play_step(setting.model, plan, batch, models, held, graphs=graphs, marked=marked)


def steps_that_fit(setting: Setting, cluster: Cluster, records: list[int]) -> Iterator[PlayedStep]:
    """The same, each with its number of records noted. Raises CinemeshError for a step that needs too much memory."""
    for step in play_buckets(setting, cluster):
        records.append(len(step.program.ops))
        check_memory(step, cluster)
        yield step


def predict_run(setting: Setting, cluster: Cluster, *, must_fit: bool) -> Predicted:
    """What the cost model says of the recipe's plan.

    ``must_fit``: raise CinemeshError when a step needs more memory, as the planner counts, than a device has.
    """
    plan = setting.config.plan
    step_s, compute_s = dict[str, float](), dict[str, float]()
    peak_bytes = 0
    for step in play_buckets(setting, cluster):
        if must_fit:
            check_memory(step, cluster)
        step_s[latent_text(step.batch.latent)] = step.step_s
        compute_s[latent_text(step.batch.latent)] = step.tape.compute_s
        peak_bytes = max(peak_bytes, step.footprint.peak_bytes)
    peak_flops_per_s = cluster.gpu.peak_flops[plan.compute_dtype]
    if cluster.has_placeholders("gpu.peak_flops"):
        print(
            f"the prices of {cluster.name} are placeholders: calibrate this machine and name its file", file=sys.stderr
        )
        peak_flops_per_s = None
    return Predicted(plan, cluster.name, cluster.device, step_s, peak_bytes, peak_flops_per_s, compute_s)


def check_memory(step: PlayedStep, cluster: Cluster) -> None:
    """Raise CinemeshError when a step needs more memory, as the planner counts, than a device has."""
    needs = step.footprint
    if needs.peak_bytes > needs.limit_bytes:
        classes = ", ".join(f"{name} {bytes_ / 1e9:.2f}" for name, bytes_ in needs.by_class.items())
        raise CinemeshError(
            f"a step of {latent_text(step.batch.latent)} latents needs {needs.peak_bytes / 1e9:.2f} GB on each device "
            f"({classes}), more than the {needs.limit_bytes / 1e9:.2f} GB of {cluster.name}",
            remedy="let the planner choose with plan: auto, recompute more, or raise tp, cp or dp_shard",
        )
