"""What a run settles before its mesh exists, once, on rank 0: the plan of ``plan: auto``, and that a plan fits.

The planner's answer stands in ``resolved.yaml`` beside the run, and the training loop reads it there: nothing that runs
a step knows the planner. A resume on as many processes keeps its plan.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ...errors import CinemeshError
from ...model.buckets import latent_text
from ...model.step import build_step
from ...parallel.ir.plan import Plan
from ...parallel.passes.pipeline import prepare
from ...perf_model.clusters.cluster import Cluster, load
from ...perf_model.prices.footprint import footprint
from ...perf_model.report.explain import describe
from ...perf_model.search.planner import search
from ...perf_model.search.request import LatentBucket, Request
from ...perf_model.search.tune import tune
from ..cluster.processes import MEETING_S
from .recipe import Auto, Config
from .resolved import FILE, Resolved
from .setting import Setting

POLL_S = 0.2


def resolve(config: Config, auto: Auto | None, world: int, rank: int) -> None:
    """See to it that the plan of a recipe with a ``cluster`` is there for ``world`` processes, and fits.

    Rank 0, or who starts the ranks of this machine, decides and writes; other ranks wait for a plan that is to come.
    Raises CinemeshError when no plan fits, or not the given one, and when rank 0's answer does not come.
    """
    assert config.cluster is not None
    directory, setting = config.logging.directory, Setting.of(config)
    if auto is None:
        if rank == 0:
            check_memory(config.plan, setting, load(config.cluster))
        return
    if rank != 0:
        _wait(directory, world, auto, setting)
        return
    known = Resolved.read(directory)
    if known is not None and holds(known.plan, world, auto, setting):
        _say(f"keeps {describe(known.plan)} of {directory / FILE}")
        return
    if known is not None and known.plan.world_size != world:
        _say(f"{directory / FILE} is of {known.plan.world_size} processes, this job of {world}: planned again")
    elif known is not None:
        _say(f"the plan of {directory / FILE} no longer suits the recipe: planned again")
    chosen = planned(world, auto, setting)
    chosen.write(directory)
    _say(f"{describe(chosen.plan)}, predicted {chosen.step_s:.3g} s a step; written to {directory / FILE}")


def holds(plan: Plan, world: int, auto: Auto, setting: Setting) -> bool:
    """Whether a plan is one of this many processes, has the fields that the recipe gives, and can run it."""
    if plan.world_size != world or any(getattr(plan, name) != value for name, value in auto.held.items()):
        return False
    try:
        _ = setting.under(plan).batches
    except CinemeshError:
        return False
    return True


def planned(world: int, auto: Auto, setting: Setting) -> Resolved:
    """The planner's best plan for the recipe's batch and buckets, tuned. Raises CinemeshError when none fits."""
    data = setting.config.data
    request = Request(
        config=setting.model,
        buckets=tuple(LatentBucket(at, of.weight) for at, of in zip(setting.latents, data.shapes, strict=True)),
        cluster=load(auto.cluster),
        gpus=world,
        global_batch=data.global_batch,
        fixed=dict(auto.held),
        shown=1,
    )
    best = tune(request, search(request).best)
    return Resolved(best.plan, request.cluster.name, best.step_s, best.peak_bytes)


def check_memory(plan: Plan, setting: Setting, cluster: Cluster) -> None:
    """Raise CinemeshError when a step of some bucket needs more memory than a device of the cluster has.

    Counted as the planner counts.
    """
    for batch in setting.under(plan).batches:
        program = prepare(build_step(setting.model, plan, batch), backend="gloo" if cluster.nccl is None else "nccl")
        needs = footprint(program, cluster)
        if needs.peak_bytes > needs.limit_bytes:
            classes = ", ".join(f"{name} {bytes_ / 1e9:.2f}" for name, bytes_ in needs.by_class.items())
            raise CinemeshError(
                f"a step of {latent_text(batch.latent)} latents needs {needs.peak_bytes / 1e9:.2f} GB on each device "
                f"({classes}), more than the {needs.limit_bytes / 1e9:.2f} GB of {cluster.name}",
                remedy="let the planner choose with plan: auto, recompute more, or raise tp, cp or dp_shard",
            )


def _wait(directory: Path, world: int, auto: Auto, setting: Setting) -> None:
    """Until rank 0 has written a plan for this job. The same test tells a plan of another job from it."""
    until = time.monotonic() + MEETING_S
    while (known := Resolved.read(directory)) is None or not holds(known.plan, world, auto, setting):
        if time.monotonic() > until:
            raise CinemeshError(
                f"plan: auto: rank 0 wrote no plan of {world} processes to {directory / FILE} in {MEETING_S:.0f} s",
                remedy="let all nodes see one logging.directory, or give a plan",
            )
        time.sleep(POLL_S)


def _say(what: str) -> None:
    print(f"plan: auto: {what}", file=sys.stderr)
