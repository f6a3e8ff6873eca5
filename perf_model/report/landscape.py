"""What the report shows of other batches and other sizes of the job: the searches behind its pictures (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..search.planner import Search, survey
from ..search.refusals import Refusal, RefusalKind
from ..search.request import PricedPlan, Request
from .explain import Tick, mean_sample_flops

DEALS = ((1, 1), (2, 1), (4, 1), (1, 2))  # samples of one micro-batch on one data rank, micro-batches
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144)  # GPUs
FAMILIES = 12  # shown at most for one size of a micro-batch


@dataclass(frozen=True)
class NeutralGroup:
    """Neutral plans: about equal throughput over different global batches, the highest throughput first."""

    choices: tuple[PricedPlan, ...]

    @property
    def batches(self) -> list[int]:
        return sorted({choice.global_batch for choice in self.choices})

    @property
    def step_s(self) -> tuple[float, float]:
        """The shortest and the longest step."""
        steps = [choice.step_s for choice in self.choices]
        return min(steps), max(steps)


@dataclass
class Landscape:
    """The best plans of the fastest families, over batch sizes.

    ``error``: relative difference in throughput that the model cannot tell. ``misfits``: families that need more memory
    than there is. ``other``: families left out for other reasons, counted. ``nothing``: why a whole size of a
    micro-batch fails.
    """

    gpus: int
    error: float = 0.0
    choices: list[PricedPlan] = field(default_factory=list)
    misfits: list[Refusal] = field(default_factory=list)
    groups: list[NeutralGroup] = field(default_factory=list)
    nothing: list[str] = field(default_factory=list)
    other: int = 0

    def frontier(self) -> list[PricedPlan]:
        """The fastest plan of every global batch, by batch."""
        best: dict[int, PricedPlan] = {}
        for choice in self.choices:
            batch = choice.global_batch
            if batch not in best or choice.samples_per_s > best[batch].samples_per_s:
                best[batch] = choice
        return [best[batch] for batch in sorted(best)]


def neutral_groups(choices: list[PricedPlan], error: float) -> list[NeutralGroup]:
    """Sets of plans over two or more global batches whose throughput differs by less than ``error`` (relative).

    One plan a batch. The fastest plan that is in no group yet leads the next one.
    """
    best: dict[int, PricedPlan] = {}
    for choice in choices:
        batch = choice.global_batch
        if batch not in best or choice.samples_per_s > best[batch].samples_per_s:
            best[batch] = choice
    left = sorted(best.values(), key=lambda choice: -choice.samples_per_s)
    groups: list[NeutralGroup] = []
    while left:
        least = (1.0 - error) * left[0].samples_per_s
        group = [choice for choice in left if choice.samples_per_s >= least]
        left = left[len(group) :]
        if len(group) > 1:
            groups.append(NeutralGroup(tuple(group)))
    return groups


def deals(request: Request) -> list[tuple[int, int]]:
    """The samples and micro-batches that are looked at."""
    fixed = request.fixed.get("micro_batches")
    return [deal for deal in DEALS if fixed is None or deal[1] == fixed] or [(request.samples, int(str(fixed)))]


def explore(request: Request, error: float, tick: Tick = lambda _: None) -> Landscape:
    """The fastest families at several samples and micro-batches. The global batch that was asked for is left open."""
    found = Landscape(request.gpus, error)
    for samples, micro_batches in deals(request):
        asked = replace(
            request,
            global_batch=None,
            samples=samples,
            shown=FAMILIES,
            fixed=request.fixed | {"micro_batches": micro_batches},
        )
        tick(f"batches of {samples} x {micro_batches} micro-batches")
        _add(found, asked, micro_batches)
    found.choices = _distinct(found.choices)
    found.groups = neutral_groups(found.choices, error)
    return found


def _add(found: Landscape, asked: Request, micro_batches: int) -> None:
    outcome = survey(asked)
    if not outcome.choices:
        found.nothing.append(f"{asked.samples} x {micro_batches} micro-batches: {outcome.nothing}")
    found.choices += outcome.choices
    misfits = [refusal for refusal in outcome.refused if refusal.kind is RefusalKind.MEMORY]
    found.misfits += misfits
    found.other += len(outcome.refused) - len(misfits)


def _distinct(choices: list[PricedPlan]) -> list[PricedPlan]:
    kept = {(choice.family, choice.global_batch): choice for choice in choices}
    return list(kept.values())


# -- scaling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The best plan of one number of GPUs, or None. ``mfu``: model FLOPs over the peak of all GPUs."""

    gpus: int
    choice: PricedPlan | None
    mfu: float

    @property
    def samples_per_gpu_s(self) -> float:
        return self.choice.samples_per_s / self.gpus if self.choice else 0.0


def sizes(request: Request) -> list[int]:
    """Numbers of GPUs to plan for: up to the cluster's own, the request's among them."""
    most = max(request.cluster.topology.servers * request.cluster.topology.gpus_per_server, request.gpus)
    return sorted({n for n in SIZES if n <= most} | {request.gpus})


def scale(request: Request, known: Search, tick: Tick = lambda _: None) -> list[Point]:
    """The best plan of every size, the global batch left open. ``known``: what the request itself found."""
    return list(_points(replace(request, global_batch=None, shown=1), request, known, tick))


def _points(asked: Request, request: Request, known: Search, tick: Tick) -> Iterator[Point]:
    per_sample = mean_sample_flops(request)
    for gpus in sizes(request):
        tick(f"{gpus:,} GPUs")
        if gpus == request.gpus and request.global_batch is None:
            choice = known.best
        else:
            outcome = survey(replace(asked, gpus=gpus))
            if not outcome.choices:
                yield Point(gpus, None, 0.0)
                continue
            choice = outcome.best
        peak = request.cluster.gpu.peak_flops[choice.plan.compute_dtype]
        yield Point(gpus, choice, per_sample * choice.samples_per_s / (gpus * peak))
