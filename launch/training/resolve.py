"""What a run settles before its mesh exists, once, on rank 0: the plan of ``plan: auto``, that a plan fits, its price.

The planner's answer stands in ``resolved.yaml`` beside the run, what the cost model says of its steps in
``predicted.yaml``, and the training loop reads both there: nothing that runs a step knows the planner. A resume on as
many processes keeps its plan; one on fewer may take fewer samples a step, where those that the recipe asks for do not
divide over what is left.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from ...data.batches import Batches, batches_told
from ...errors import CinemeshError
from ...kernels.selection import PLAIN_INSTALL, Software, packages_of
from ...perf_model.clusters.cluster import Cluster, load
from ...perf_model.report.explain import describe
from ...perf_model.report.software import kernels_of
from ...perf_model.search.planner import NEAR, search, survey
from ...perf_model.search.request import Request, buckets_of_batches
from ...perf_model.search.space import divisors
from ...perf_model.search.tune import tune
from ..cluster.meeting import MEETING_S
from .predict import loop_encoders, predict_run
from .recipe import Auto, Config
from .resolved import FILE, Resolved
from .setting import Setting

POLL_S = 0.2
MOST_BATCHES = 4  # that the planner is asked for: the next one is smaller, and so is what it gains


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
        chosen = _settled(directory, world, auto, setting)
        setting = setting.under(chosen.plan, chosen.global_batches)
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


def _settled(directory: Path, world: int, auto: Auto, setting: Setting) -> Resolved:
    """The plan of ``plan: auto``: that of the run's directory where it still holds, else the planner's, written."""
    if (held := resolved_before(world, auto, setting)) is not None:
        return held
    known = Resolved.read(directory)
    if known is not None and known.plan.world_size != world:
        _say(f"{directory / FILE} is of {known.plan.world_size} processes, this job of {world}: planned again")
    elif known is not None:
        _say(f"the plan of {directory / FILE} no longer suits the recipe: planned again")
    chosen = planned(world, auto, setting, known.full_ranks if known else world)
    chosen.write(directory)
    cluster = cluster_under(setting.config, auto.cluster)
    packages = dict.fromkeys(k.package for k in kernels_of(cluster, setting.model, chosen.plan.compute_dtype))
    priced = f"predicted {chosen.step_s:.3g} s a step with attention on {', '.join(packages)}"
    _say(f"{describe(chosen.plan)}, {priced}; written to {directory / FILE}")
    if chosen.global_batches != setting.global_batches:
        _say(f"WARNING: {world} of {chosen.full_ranks} processes are left: "
             f"a step takes {batches_told(chosen.global_batches, setting.global_batches)}")  # fmt: skip
    return chosen


def resolved_before(world: int, auto: Auto, setting: Setting) -> Resolved | None:
    """The plan of the run's directory, where it still holds; says so."""
    directory = setting.config.logging.directory
    known = Resolved.read(directory)
    if known is None or not holds(known, world, auto, setting):
        return None
    _say(f"keeps {describe(known.plan)} of {directory / FILE}")
    return known


def holds(known: Resolved, world: int, auto: Auto, setting: Setting) -> bool:
    """Whether a plan is one of this many processes, has the fields that the recipe gives, and can run it."""
    plan, batches = known.plan, known.global_batches
    if plan.world_size != world or any(getattr(plan, name) != value for name, value in auto.held.items()):
        return False
    if batches not in possible_batches(setting, world, known.full_ranks):
        return False
    try:
        _ = setting.under(plan, batches).batches
    except CinemeshError:
        return False
    return True


def planned(world: int, auto: Auto, setting: Setting, full_ranks: int | None = None) -> Resolved:
    """The planner's best plan for the recipe's batch and buckets, tuned.

    Of a run that had ``full_ranks`` and has fewer left, also for smaller batches: the largest whose samples/s the
    planner cannot tell from the best ones. Raises CinemeshError when no plan fits.
    """
    full_ranks = max(world, full_ranks or 0)
    cluster = cluster_under(setting.config, auto.cluster)
    weights = setting.config.data.step_weights

    def asked(batches: Batches) -> Request:
        buckets, global_batch = buckets_of_batches(setting.latents, weights, batches)
        held = dict(auto.held)
        return Request(
            setting.model, buckets, cluster, world, global_batch, fixed=held, shown=1,
            encoders=loop_encoders(setting),
        )  # fmt: skip

    possible = possible_batches(setting, world, full_ranks)
    surveyed = {batches: survey(asked(batches)) for batches in possible} if len(possible) > 1 else {}
    found = {batches: one.best for batches, one in surveyed.items() if one.choices}
    if not found:
        found = {possible[0]: search(asked(possible[0])).best}
    most = max(best.samples_per_s for best in found.values())
    batches = next(batches for batches, best in found.items() if best.samples_per_s >= (1.0 - NEAR) * most)
    best = tune(asked(batches), found[batches])
    return Resolved(best.plan, cluster.name, best.step_s, best.peak_bytes, full_ranks, batches)


def possible_batches(setting: Setting, world: int, full_ranks: int) -> list[Batches]:
    """Samples of a step of every bucket that ``world`` ranks may take: the recipe's; the largest first, of those left.

    Of each number of data ranks: as many samples as they divide, of those that the recipe asks for.
    """
    asked = tuple(setting.config.data.global_batches)
    if setting.config.on_loss == "exact" or world >= full_ranks:
        return [asked]
    divided = {tuple(size // n * n for size in asked) for n in divisors(world) if n <= min(asked)}
    return sorted(divided, key=sum, reverse=True)[:MOST_BATCHES]


def _wait(directory: Path, world: int, auto: Auto, setting: Setting) -> None:
    """Until rank 0 has written a plan for this job. The same test tells a plan of another job from it."""
    until = time.monotonic() + MEETING_S
    while (known := Resolved.read(directory)) is None or not holds(known, world, auto, setting):
        if time.monotonic() > until:
            raise CinemeshError(
                f"plan: auto: rank 0 wrote no plan of {world} processes to {directory / FILE} in {MEETING_S:.0f} s",
                remedy="let all nodes see one logging.directory, or give a plan",
            )
        time.sleep(POLL_S)


def _say(what: str) -> None:
    print(f"plan: auto: {what}", file=sys.stderr)
