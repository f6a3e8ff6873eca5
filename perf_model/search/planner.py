"""Which plan to run: branch and bound over degrees, shard group, placement and recompute (torch-free).

A family is a choice of tp, cp, samples and micro-batches. Within a family the search goes through every size of the
FSDP shard group, every placement of the axes on the network, and the lightest recompute that fits. Families, then their
recompute modes, then their variants are opened in the order of their lower bounds (``lower_bound.py``,
``Extrapolation.bound_s``), until no bound can reach the table. With ``prune`` off everything is played: the truth that
tests compare with.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from ...errors import CinemeshError
from ...model.config import latent_text
from ...parallel.ir.fields import AXES
from .dealing import dealt
from .evaluator import Evaluator
from .frontier import Frontier
from .nearby import close_batches, fewer_gpus
from .refusals import FamilyKey, Refusal, RefusalKind
from .request import PricedPlan, Request, Timed
from .space import Family, SearchSpace, divisors

MOST_TIMES = 64  # as many GPUs as asked for are offered where no plan fits: more is another job
# Of a difference, on published runs of other trainers (``cinemesh validate``, 2026-11-23): of pairs of plans predicted
# further apart, 97 % ran in that order; closer, 88 %.
NEAR = 0.02


@dataclass
class Search:
    """Ranked plans, the best first, and what was refused.

    ``error``: relative error of a difference between plans. ``untuned``: the best one before they were tuned.
    ``evaluator``: what priced them. ``least_left_s``: a lower bound of a sample's seconds under what was not opened.
    """

    request: Request
    choices: list[PricedPlan]
    refused: list[Refusal]
    error: float
    evaluator: Evaluator
    played: int = 0
    bounded: int = 0
    untuned: PricedPlan | None = None
    least_left_s: float = math.inf

    @property
    def best(self) -> PricedPlan:
        return self.choices[0]

    @property
    def played_whole(self) -> int:
        """Plans shown whose every record was played, since a few blocks did not tell."""
        return sum(choice.timed is Timed.PLAYED for choice in self.choices)

    @property
    def nothing(self) -> str:
        """Where no plan fits: what came nearest, in a sentence."""
        request, near = self.request, self.nearest
        shapes = ", ".join(latent_text(b.latent) for b in request.buckets)
        why = f" (nearest: {near.family}: {near.reason})" if near else ""
        return f"no plan of {request.gpus} GPUs of {request.cluster.name} runs {request.config.name} on {shapes}{why}"

    @property
    def nearest(self) -> Refusal | None:
        """The refused family of the fewest micro-batches too many, else that of the least memory, else the first."""
        too_many = [refusal for refusal in self.refused if refusal.kind is RefusalKind.MICRO_BATCHES]
        if too_many:
            return min(too_many, key=lambda r: r.family.micro_batches)
        too_big = [refusal for refusal in self.refused if refusal.kind is RefusalKind.MEMORY]
        return min(too_big, key=lambda r: r.needs_bytes) if too_big else self.refused[0] if self.refused else None

    def near_ties(self) -> list[PricedPlan]:
        """Plans whose throughput the model cannot tell from the best one's."""
        return [c for c in self.choices[1:] if c.samples_per_s >= (1.0 - self.error) * self.best.samples_per_s]


def _families(space: SearchSpace, refused: list[Refusal]) -> list[Family]:
    request = space.request
    families: list[Family] = []
    fixed = request.fixed
    for tp in divisors(request.gpus):
        if fixed.get("tp", tp) != tp or ("tp" not in fixed and tp > request.config.heads):
            continue
        for cp in divisors(request.gpus // tp):
            if fixed.get("cp", cp) != cp:
                continue
            family = Family(space, FamilyKey(tp, cp))
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
            if not family.shard_groups():
                refused.append(Refusal(RefusalKind.DIVIDES, family.key, family.no_groups()))
                continue
            families.extend(dealt(space, tp, cp, refused))
    return families


def search(request: Request) -> Search:
    """Ranked plans for a request: the best variant of each family.

    Raises CinemeshError when no plan fits: it says which came nearest and what would fit.
    """
    found = survey(request)
    if not found.choices:
        raise CinemeshError(found.nothing, remedy=_remedy(found))
    return found


def _check_degrees(request: Request) -> None:
    """Raise CinemeshError for degrees fixed by hand that do not divide the GPUs: no family would have them."""
    given = {axis: cast(int, request.fixed[axis]) for axis in AXES if axis in request.fixed}
    product = math.prod(given.values())
    if rest := request.gpus % product:
        shown = " * ".join(f"{axis}({degree})" for axis, degree in given.items())
        shown = f"({shown} = {product})" if len(given) > 1 else shown
        raise CinemeshError(
            f"gpus({request.gpus}) % {shown} = {rest}", remedy="fix degrees whose product divides the GPUs"
        )


def survey(request: Request, worth_s: float = math.inf) -> Search:
    """As ``search``; where no plan fits, a search without choices. ``worth_s``: more for a sample is not looked at.

    Raises CinemeshError for more GPUs than the cluster has, and for latents that the model cannot take.
    """
    cluster = request.cluster
    for bucket in request.buckets:
        request.config.tokens(bucket.latent)
    if not request.gpus <= cluster.gpus:
        raise CinemeshError(
            f"{request.gpus} GPUs > {cluster.gpus} of {cluster.name} "
            f"({cluster.topology.servers} servers of {cluster.gpus_per_server})",
            remedy="use fewer, another cluster, or more --servers of this one",
        )
    _check_degrees(request)
    if request.fixed.get("offload") and "recompute" not in request.fixed:
        raise CinemeshError(
            "offload is fixed, and recompute is not: what is kept decides what can be offloaded",
            remedy="fix recompute too, or leave both to --tune",
        )
    space = SearchSpace(request)
    refused: list[Refusal] = []
    families = _families(space, refused)
    opened = Frontier(space, families, worth_s)
    shown = opened.settled()
    refused += [opened.refusal(family) for family in families if family not in shown]
    choices = list(shown.values())
    evaluator = space.evaluator
    counted = evaluator.priced, evaluator.bounded
    return Search(request, choices, refused, NEAR, evaluator, *counted, least_left_s=opened.least_left_s)


@dataclass(frozen=True)
class Nearby:
    """The best plan of another batch or of fewer GPUs. ``gain``: samples/s more than what was asked for, relative."""

    gpus: int
    best: PricedPlan
    gain: float


def nearby(request: Request, found: Search) -> list[Nearby]:
    """What is better, close by, than the best plan found by more than the planner can be wrong; the best first.

    What is looked at later is told where it is better than that, too.
    """
    better: list[Nearby] = []
    worth_s = found.best.per_sample_s / (1.0 + NEAR)
    for asked in _close_by(request):
        for best in _best_of(asked, worth_s):
            worth_s = min(worth_s, best.per_sample_s)
            gain = best.samples_per_s / found.best.samples_per_s - 1.0
            better.append(Nearby(best.plan.world_size, best, gain))
    return sorted((other for other in better if other.gain > NEAR), key=lambda other: -other.gain)


def _fitting(asked: Request) -> FamilyKey | None:
    """A family with a plan that fits, of few samples at once: found without a price."""
    with contextlib.suppress(CinemeshError):
        _check_degrees(asked)
        families, too_big = _families(SearchSpace(asked), []), set[tuple[int, int]]()
        for family in sorted(families, key=lambda f: (f.samples, f.key.micro_batches, f.key.model_parallel)):
            degrees = family.key.tp, family.key.cp
            if degrees in too_big:  # on fewer samples
                continue
            if family.expand(family.modes()[-1], family.shard_groups())[0]:
                return family.key
            too_big.add(degrees)
    return None


def _best_of(asked: Request, worth_s: float = math.inf) -> list[PricedPlan]:
    """The best plan of a request, if it has one."""
    with contextlib.suppress(CinemeshError):  # degrees fixed by hand that do not divide it
        return survey(replace(asked, shown=1), worth_s).choices
    return []


def _close_by(request: Request) -> Iterator[Request]:
    """The same for other batches and for fewer GPUs, what splits best first."""
    for batch in close_batches(request):
        yield replace(request, global_batch=batch)
    for gpus in fewer_gpus(request):
        yield replace(request, gpus=gpus)


def _remedy(found: Search) -> str:
    """Where no plan fits: how many GPUs of this cluster would do."""
    request = found.request
    if found.nearest is None or found.nearest.kind is not RefusalKind.MEMORY:
        fixed = ", ".join(sorted(request.fixed))
        free = f"free {fixed}, or " if fixed else ""
        for asked in _close_by(request):
            if (fits := _fitting(asked)) is not None:
                batch = asked.batch_text(fits.global_batch(asked.gpus))
                close = f"{asked.gpus} GPUs and a global batch of {batch}"
                return f"{free}{close} would do, with tp={fits.tp} cp={fits.cp}"
        if found.nearest is not None and found.nearest.kind is RefusalKind.MICRO_BATCHES:
            many = found.nearest.family.micro_batches
            return f"{free}take fewer samples a step or more GPUs, or ask for them: --fix micro_batches={many}"
        return f"{free}change the GPUs or the global batch"
    if found.nearest.fixed and found.nearest.full_bytes <= found.nearest.free_bytes:
        return "free recompute: the planner chooses what to keep"
    gpus = 2 * request.gpus
    while request.global_batch is None and gpus <= min(request.cluster.gpus, MOST_TIMES * request.gpus):
        if (fits := _fitting(replace(request, gpus=gpus))) is not None:
            return f"{gpus} GPUs fit, with tp={fits.tp} cp={fits.cp}; or use a smaller latent"
        gpus *= 2
    return "use far more GPUs, GPUs with more memory, or a smaller latent"
