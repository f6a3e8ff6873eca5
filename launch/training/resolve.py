"""What a run settles before its mesh exists, once, on rank 0: the plan of ``plan: auto``, that a plan fits, its price.

The planner's answer stands in ``resolved.yaml`` beside the run, what the cost model says of its steps in
``predicted.yaml``, and the training loop reads both there: nothing that runs a step knows the planner. A resume on as
many processes keeps its plan.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from ...errors import CinemeshError
from ...kernels.selection import PLAIN_INSTALL, Software, packages_of
from ...parallel.ir.plan import Plan
from ...perf_model.clusters.cluster import Cluster, load
from ...perf_model.report.explain import describe
from ...perf_model.report.software import kernels_of
from ...perf_model.search.planner import search
from ...perf_model.search.request import Request, buckets_of_batches
from ...perf_model.search.tune import tune
from ..cluster.meeting import MEETING_S
from .predict import predict_run
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
    if rank != 0:
        if auto is not None:
            _wait(directory, world, auto, setting)
        return
    if auto is not None:
        setting = setting.under(_settled(directory, world, auto, setting))
    predict_run(setting, cluster_under(config, config.cluster), must_fit=auto is None).write(directory)


def cluster_under(config: Config, name: str) -> Cluster:
    """The cluster with the kernels and the capture that a run has there. Raises CinemeshError as ``software_of``."""
    return load(name).running(software_of(config)).capturing(config.capture)


def software_of(config: Config) -> Software:
    """What a run's kernels are chosen of: the packages that the recipe states, or this machine's.

    Raises CinemeshError for a package or an override that names nothing.
    """
    software = Software.planned(config.kernels, config.deterministic)
    if config.packages is None:
        return software
    return replace(software, missing=PLAIN_INSTALL.beside(packages_of(config.packages)).missing)


def _settled(directory: Path, world: int, auto: Auto, setting: Setting) -> Plan:
    """The plan of ``plan: auto``: that of the run's directory where it still holds, else the planner's, written."""
    if (held := resolved_before(world, auto, setting)) is not None:
        return held.plan
    known = Resolved.read(directory)
    if known is not None and known.plan.world_size != world:
        _say(f"{directory / FILE} is of {known.plan.world_size} processes, this job of {world}: planned again")
    elif known is not None:
        _say(f"the plan of {directory / FILE} no longer suits the recipe: planned again")
    chosen = planned(world, auto, setting)
    chosen.write(directory)
    cluster = cluster_under(setting.config, auto.cluster)
    packages = dict.fromkeys(k.package for k in kernels_of(cluster, setting.model, chosen.plan.compute_dtype))
    priced = f"predicted {chosen.step_s:.3g} s a step with attention on {', '.join(packages)}"
    _say(f"{describe(chosen.plan)}, {priced}; written to {directory / FILE}")
    return chosen.plan


def resolved_before(world: int, auto: Auto, setting: Setting) -> Resolved | None:
    """The plan of the run's directory, where it still holds; says so."""
    directory = setting.config.logging.directory
    known = Resolved.read(directory)
    if known is None or not holds(known.plan, world, auto, setting):
        return None
    _say(f"keeps {describe(known.plan)} of {directory / FILE}")
    return known


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
    weights = [bucket.weight for bucket in data.shapes]
    buckets, global_batch = buckets_of_batches(setting.latents, weights, data.global_batches)
    request = Request(
        config=setting.model,
        buckets=buckets,
        cluster=cluster_under(setting.config, auto.cluster),
        gpus=world,
        global_batch=global_batch,
        fixed=dict(auto.held),
        shown=1,
    )
    best = tune(request, search(request).best)
    return Resolved(best.plan, request.cluster.name, best.step_s, best.peak_bytes)


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
