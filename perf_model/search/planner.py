"""Which plan to run: branch and bound over degrees, shard group, placement and recompute (torch-free).

A family is a choice of tp, cp, samples and micro-batches. Within a family the search goes through every size of the
FSDP shard group, every placement of the axes on the network, and the lightest recompute that fits. Families, then their
recompute modes, then their variants are opened in the order of their lower bounds (``lower_bound.py``,
``Skeleton.bound_s``), until no bound can reach the table. With ``prune`` off everything is played: the truth that tests
compare with.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import CinemeshError
from ...model.config import latent_text
from .refusals import FamilyKey, Refusal, RefusalKind
from .space import Choice, Family, Mode, Prices, Request, Variant, divisors

# Relative errors on published runs of other trainers (perf_model/published, ``cinemesh validate``, 2026-11-23).
ERROR_BAR = 0.054  # of a step time: mean over sources that were left out of the fit
NEAR = 0.02  # of a difference: of pairs of plans predicted further apart, 97 % ran in that order; closer, 88 %


@dataclass
class Search:
    """Ranked plans, the best first, and what was refused. ``error``: relative error of a difference between plans."""

    request: Request
    choices: list[Choice]
    refused: list[Refusal]
    error: float
    played: int = 0
    bounded: int = 0

    @property
    def best(self) -> Choice:
        return self.choices[0]

    @property
    def nothing(self) -> str:
        """Where no plan fits: what came nearest, in a sentence."""
        request, near = self.request, self.nearest
        shapes = ", ".join(latent_text(b.latent) for b in request.buckets)
        why = f" (nearest: {near.family}: {near.reason})" if near else ""
        return f"no plan of {request.gpus} GPUs of {request.cluster.name} runs {request.config.name} on {shapes}{why}"

    @property
    def nearest(self) -> Refusal | None:
        """The refused family that needs the least memory; one of another kind where none fails for that."""
        too_big = [refusal for refusal in self.refused if refusal.kind is RefusalKind.MEMORY]
        return min(too_big, key=lambda r: r.needs_bytes) if too_big else self.refused[0] if self.refused else None

    def near_ties(self) -> list[Choice]:
        """Plans whose throughput the model cannot tell from the best one's."""
        return [c for c in self.choices[1:] if c.samples_per_s >= (1.0 - self.error) * self.best.samples_per_s]


def _families(prices: Prices, refused: list[Refusal]) -> list[Family]:
    request = prices.request
    families: list[Family] = []
    fixed = request.fixed
    for tp in divisors(request.gpus):
        if fixed.get("tp", tp) != tp or tp > request.config.heads:
            continue
        for cp in divisors(request.gpus // tp):
            if fixed.get("cp", cp) != cp:
                continue
            family = Family(prices, FamilyKey(tp, cp))
            try:
                family.check_placement()
            except CinemeshError as error:
                refused.append(Refusal(RefusalKind.PLACEMENT, family.key, error.problem))
                break  # no cp mends it
            try:
                family.check_shapes()
            except CinemeshError as error:
                refused.append(Refusal(RefusalKind.DIVIDES, family.key, error.problem))
                if error.what != "tokens":
                    break  # no cp mends it
                continue
            families.extend(_batches(prices, tp, cp, refused))
    return families


def _batches(prices: Prices, tp: int, cp: int, refused: list[Refusal]) -> Iterator[Family]:
    """Families of one (tp, cp): how the samples of a step are dealt out."""
    request = prices.request
    data_ranks = request.gpus // (tp * cp)
    fixed = request.fixed
    if request.global_batch is None:
        micro_batches = int(fixed.get("micro_batches", 1))  # type: ignore[arg-type]
        yield Family(prices, FamilyKey(tp, cp, request.samples, micro_batches))
        return
    if request.global_batch % data_ranks:
        rule = f"global batch({request.global_batch}) % data ranks({data_ranks}) != 0"
        refused.append(Refusal(RefusalKind.DIVIDES, FamilyKey(tp, cp), rule))
        return
    share = request.global_batch // data_ranks
    for micro_batches in divisors(share):
        if fixed.get("micro_batches", micro_batches) == micro_batches:
            yield Family(prices, FamilyKey(tp, cp, share // micro_batches, micro_batches))


@dataclass(order=True)
class _Todo:
    """Something that the search may open: a recompute mode of a family, or one variant to play.

    ``per_sample_s`` is a lower bound of what it can lead to.
    """

    per_sample_s: float
    number: int
    family: Family = field(compare=False)
    modes: tuple[Mode, ...] = field(compare=False, default=())
    groups: list[int] = field(compare=False, default_factory=list)
    variant: Variant | None = field(compare=False, default=None)


def search(request: Request) -> Search:
    """Ranked plans for a request: the best variant of each family.

    Raises CinemeshError when no plan fits: it says which came nearest and what would fit.
    """
    found = survey(request)
    if not found.choices:
        raise CinemeshError(found.nothing, remedy=_remedy(found))
    return found


def survey(request: Request) -> Search:
    """As ``search``; where no plan fits, a search without choices.

    Whatever has the lowest bound is opened first; the search ends when no bound is below the last plan shown.
    Raises CinemeshError for more GPUs than the cluster has, and for latents that the model cannot take.
    """
    for bucket in request.buckets:
        request.config.tokens(bucket.latent)
    if not request.gpus <= request.cluster.gpus:
        raise CinemeshError(
            f"{request.gpus} GPUs > {request.cluster.gpus} of {request.cluster.name} "
            f"({request.cluster.topology.servers} servers of {request.cluster.gpus_per_server})",
            remedy="use fewer, or another cluster",
        )
    prices = Prices(request)
    refused: list[Refusal] = []
    spread = request.cluster.spread.factor(request.gpus)
    number = itertools.count()
    heap: list[_Todo] = []

    def push(family: Family, step_s: float, **what: Any) -> None:
        per_sample_s = step_s * spread / family.global_batch
        heapq.heappush(heap, _Todo(per_sample_s, next(number), family, **what))

    families = _families(prices, refused)
    for family in reversed(families):  # of equal floors, what splits most is opened first: it is the first to fit
        modes = family.modes()
        push(family, family.floor_s(modes[0]), modes=modes, groups=family.shard_groups())
    best: dict[Family, Choice] = {}

    def last_shown_s() -> float:
        """Seconds a sample of the last plan shown, as far as known."""
        times = sorted(choice.step_s / choice.global_batch for choice in best.values())
        return times[request.shown - 1] if len(times) >= request.shown else math.inf

    worst = math.inf
    bounds: dict[Family, float] = {}
    while heap:
        todo = heapq.heappop(heap)
        family = todo.family
        if request.prune and todo.per_sample_s >= worst:
            bounds.setdefault(family, todo.per_sample_s)
            continue
        if todo.variant is not None:
            known = best.get(family)
            if request.prune and known and todo.per_sample_s >= known.step_s / known.global_batch:
                continue
            choice = prices.play(family, todo.variant)
            if known is None or (choice.step_s, repr(choice.plan)) < (known.step_s, repr(known.plan)):
                best[family] = choice
                worst = last_shown_s()
            continue
        if family.too_big(todo.modes[0][0]):
            variants, unfit = [], todo.groups
        else:
            variants, unfit = family.expand(todo.modes[0], todo.groups)
        for variant in variants:
            push(family, variant.bound_s, variant=variant)
        if unfit and todo.modes[1:]:
            push(family, family.floor_s(todo.modes[1]), modes=todo.modes[1:], groups=unfit)
    ranked = sorted(best.items(), key=lambda item: (item[1].step_s / item[1].global_batch, repr(item[1].plan)))
    shown = {family for family, _ in ranked[: request.shown]}
    for family in families:
        if family in shown:
            continue
        if family in best:
            behind = best[family].step_s / best[family].global_batch / worst - 1.0
            refused.append(Refusal(RefusalKind.SLOWER, family.key, slower=behind))
        elif family in bounds:
            behind = bounds[family] / worst - 1.0
            refused.append(Refusal(RefusalKind.SLOWER, family.key, slower=behind, at_least=True))
        else:
            refused.append(_too_big(prices, family))
    choices = [choice for _, choice in ranked[: request.shown]]
    return Search(request, choices, refused, NEAR, prices.played, prices.bounded)


def _too_big(prices: Prices, family: Family) -> Refusal:
    need = family.least_peak or family.floor_bytes("full")
    free = prices.limit_bytes(family.plan)
    return Refusal(RefusalKind.MEMORY, family.key, needs_bytes=need, free_bytes=free)


def _remedy(found: Search) -> str:
    """Where no plan fits: how many GPUs of this cluster would do."""
    request = found.request
    if found.nearest is None or found.nearest.kind is not RefusalKind.MEMORY:
        return "free the fixed fields, or change the GPUs or the global batch"
    gpus = 2 * request.gpus
    while request.global_batch is None and gpus <= request.cluster.gpus:
        if fits := survey(replace(request, gpus=gpus, shown=1)).choices:
            return f"{gpus} GPUs fit, with tp={fits[0].plan.tp} cp={fits[0].plan.cp}; or use a smaller latent"
        gpus *= 2
    return "use GPUs with more memory or a smaller latent"
