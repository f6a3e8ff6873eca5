"""How many samples a data rank takes at once, where nobody says: the fewest that are nearly as fast (torch-free).

A step of few tokens pays for its collectives, its launches and its weights once, however many samples share them. More
samples in a step are more in the global batch, which is not free for training: so the fewest are taken whose sample
costs at most ``WITHIN`` more than that of the best that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from ...errors import CinemeshError
from .planner import Search, search, survey
from .request import PricedPlan, Request

WITHIN = 0.02  # of a sample's cost: what the planner cannot tell apart (``NEAR``)
GAIN = 0.01  # of a doubling: what is saved falls at least by half each time, so later ones add up to no more than this
MOST = 256  # samples tried


@dataclass(frozen=True)
class TriedSamples:
    """How fast a plan of so many samples is."""

    samples: Annotated[int, "of one micro-batch on one data rank"]
    samples_per_s: Annotated[float, "of all GPUs, under the tp and cp that are best for one"]
    at_most: Annotated[bool, "whether that is a bound, too low for more to be asked"] = False


def search_samples(request: Request) -> tuple[Request, Search, list[TriedSamples]]:
    """As ``search``, the samples of a data rank chosen too; with them the request, and what was tried.

    Raises CinemeshError as ``search`` does, for one sample.
    """
    one = replace(request, samples=1)
    found = search(one)
    tried = list(_more(one, found.best))
    fewest = _fewest(tried)
    if fewest == 1:
        return one, found, tried
    chosen = replace(request, samples=fewest)
    return chosen, search(chosen), tried


def _more(one: Request, best: PricedPlan) -> Iterator[TriedSamples]:
    """The best plan with twice as many samples, and again, as long as that pays and fits."""
    yield TriedSamples(best.samples, best.samples_per_s)
    degrees = {"tp": best.plan.tp, "cp": best.plan.cp}
    before, samples = best.samples_per_s, 2
    while samples <= MOST:
        asked, enough = replace(one, samples=samples, shown=1, fixed=one.fixed | degrees), before * (1.0 + GAIN)
        try:
            found = survey(asked, worth_s=1.0 / enough)
        except CinemeshError:
            return  # a shape forbids it
        if not found.choices:
            if found.least_left_s < math.inf:
                yield TriedSamples(samples, 1.0 / found.least_left_s, at_most=True)
            return
        yield TriedSamples(samples, found.best.samples_per_s)
        if found.best.samples_per_s < enough:
            return
        before, samples = found.best.samples_per_s, 2 * samples


def _fewest(tried: list[TriedSamples]) -> int:
    known = [one for one in tried if not one.at_most]
    enough = max(one.samples_per_s for one in known) / (1.0 + WITHIN)
    return min(one.samples for one in known if one.samples_per_s >= enough)
