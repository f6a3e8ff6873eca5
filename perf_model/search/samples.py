"""How many samples a data rank takes at once, where nobody says: the fewest that are nearly as fast (torch-free).

A step of few tokens pays for its collectives, its launches and its weights once, however many samples share them. More
samples in a step are more in the global batch, which is not free for training: so the fewest are taken whose sample
costs at most ``WITHIN`` more than that of the best that fits. Of several buckets each has its own: the longest, which
takes most of the time, those that suit it alone, and every other one those that suit it under the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from ...errors import CinemeshError
from ...model.config import latent_text
from .evaluator import Evaluator
from .planner import Search, search, survey
from .request import LatentBucket, PricedPlan, Request

WITHIN = 0.02  # of a sample's cost: what the planner cannot tell apart (``NEAR``)
GAIN = 0.01  # of a doubling: what is saved falls at least by half each time, so later ones add up to no more than this
MOST = 256  # samples tried


@dataclass(frozen=True)
class TriedSamples:
    """How fast a plan of so many samples is."""

    samples: Annotated[int, "of one micro-batch on one data rank"]
    samples_per_s: Annotated[float, "of all GPUs, under the tp and cp that are best for one"]
    at_most: Annotated[bool, "whether that is a bound, too low for more to be asked"]
    latent: Annotated[str, "whose samples they are"]
    under_its_plan: Annotated[bool, "under the plan that is best for the longest latent, this being another one"]


def search_samples(request: Request) -> tuple[Request, Search, list[TriedSamples]]:
    """As ``search``, the samples of a data rank chosen too; with them the request, and what was tried.

    Raises CinemeshError as ``search`` does, for one sample.
    """
    longest, *others = sorted(request.buckets, key=lambda bucket: -request.config.tokens(bucket.latent))
    one = replace(request, samples=1, buckets=(longest,))
    found = search(one)
    plans, bound = _doubled(found.best, lambda samples, enough: _searched(one, found.best, samples, enough))
    tried = _told(longest, plans, bound)
    best = next(plan for plan in plans if plan.samples == _fewest(plans))
    if not others:
        chosen = replace(one, samples=best.samples)
        return chosen, found if best is found.best else search(chosen), tried
    samples = {longest.latent: best.samples}
    for bucket in others:
        plans = _under(one, bucket, best)
        tried += _told(bucket, plans, under_its_plan=True)
        samples[bucket.latent] = _fewest(plans)
    common = math.gcd(*samples.values())
    buckets = tuple(replace(bucket, times=samples[bucket.latent] // common) for bucket in request.buckets)
    chosen = replace(request, samples=common, buckets=buckets)
    return chosen, search(chosen), tried


def _told(
    bucket: LatentBucket, plans: list[PricedPlan], bound: float | None = None, *, under_its_plan: bool = False
) -> list[TriedSamples]:
    """``bound``: samples/s that a plan of twice the last samples stays below."""
    of = (latent_text(bucket.latent), under_its_plan)
    told = [TriedSamples(plan.samples, plan.samples_per_s, False, *of) for plan in plans]
    return told if bound is None else [*told, TriedSamples(2 * plans[-1].samples, bound, True, *of)]


# A plan of so many samples, where it can be of so many samples/s: else a bound of these. None where there is none.
Offer = Callable[[int, float], PricedPlan | float | None]


def _doubled(first: PricedPlan, of: Offer) -> tuple[list[PricedPlan], float | None]:
    """A plan, one of twice its samples, and again, as long as that pays and ``of`` has one; the bound that ended it."""
    plans = [first]
    while plans[-1].samples < MOST:
        enough = plans[-1].samples_per_s * (1.0 + GAIN)
        found = of(2 * plans[-1].samples, enough)
        if not isinstance(found, PricedPlan):
            return plans, found
        plans.append(found)
        if found.samples_per_s < enough:
            break
    return plans, None


def _searched(one: Request, best: PricedPlan, samples: int, enough: float) -> PricedPlan | float | None:
    """The best plan of so many samples under the same tp and cp."""
    degrees = {"tp": best.plan.tp, "cp": best.plan.cp}
    asked = replace(one, samples=samples, shown=1, fixed=one.fixed | degrees)
    try:
        found = survey(asked, worth_s=1.0 / enough)
    except CinemeshError:
        return None  # a shape forbids it
    if found.choices:
        return found.best
    return 1.0 / found.least_left_s if found.least_left_s < math.inf else None


def _under(one: Request, bucket: LatentBucket, best: PricedPlan) -> list[PricedPlan]:
    """Another bucket's steps under a plan that was found for the longest, of the samples that fit beside its own."""
    evaluator = Evaluator(replace(one, buckets=(bucket,)))
    usable = one.cluster.memory.usable_bytes

    def of(samples: int, _: float) -> PricedPlan | None:
        ways = evaluator.encoders(best.plan, samples)
        held = next(way for way in ways if way is None or best.frozen is None or way.sharded == best.frozen.sharded)
        batch = samples * best.plan.data_ranks * best.plan.micro_batches
        asked = replace(best, samples=samples, global_batch=batch, frozen=held, bound_s=0.0)
        try:
            choice = evaluator.settled(asked)
        except CinemeshError:
            return None  # a shape forbids it
        return choice if choice.peak_bytes <= usable else None

    first = of(1, 0.0)
    return [] if first is None else _doubled(first, of)[0]


def _fewest(plans: list[PricedPlan]) -> int:
    """The fewest samples that are nearly as fast as any; one where no plan was found."""
    enough = max((plan.samples_per_s for plan in plans), default=0.0) / (1.0 + WITHIN)
    return min((plan.samples for plan in plans if plan.samples_per_s >= enough), default=1)
