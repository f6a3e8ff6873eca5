"""Votes and key together: what every axis says of every two systems, and of all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..errors import CinemeshError
from .axes import Axis
from .net_win import NetWin, net_wins
from .raters import Rater, alpha, audit, preferred_system
from .ratings import Rating, elo_ratings, why_unrated
from .votes import Judgement, ShownPair, Vote


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one axis says of two systems. ``net``: of the first over the second.

    ``short``: prompts with fewer votes than the axis wants, which count as they are; ``unjudged``: without any.
    ``agreement``: Krippendorff's alpha. ``reasons``: of votes for the first system, and for the second.
    ``groups``: the same net win among the prompts of a concept, and of a level of motion.
    """

    axis: str
    first: str
    second: str
    net: NetWin
    votes: int
    short: int
    unjudged: int
    agreement: float | None
    reasons: dict[str, tuple[int, int]]
    groups: dict[str, NetWin]


@dataclass(frozen=True, kw_only=True)
class AxisRatings:
    """Ratings of all systems on one axis; none, and ``why``, where no finite ones are the likeliest."""

    axis: str
    ratings: list[Rating]
    why: str


@dataclass(frozen=True, kw_only=True)
class JudgedScore:
    """``systems``: name -> best of how many. ``ratings``: of more than two systems."""

    systems: dict[str, int]
    comparisons: list[Comparison]
    ratings: list[AxisRatings]
    raters: list[Rater]


def score_votes(votes: Sequence[Vote], key: Judgement) -> JudgedScore:
    """What the votes say. Raises CinemeshError where the audit leaves out every rater, or nothing is left to count."""
    raters = audit(votes, key)
    out = {rater.name for rater in raters if rater.left_out}
    by_axis: defaultdict[str, defaultdict[str, list[Vote]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        if vote.rater not in out and key.pairs[vote.pair].scored:
            by_axis[vote.axis][vote.pair].append(vote)
    if not by_axis:
        why = [f"{rater.name} {rater.left_out}" for rater in raters if rater.left_out]
        raise CinemeshError(
            f"no vote is left to count{': ' if why else ''}{', '.join(why)}", remedy="let more people judge"
        )
    judged = [axis for axis in key.axes if axis.name in by_axis]
    comparisons = [
        found
        for axis in judged
        for first, second in combinations(key.systems, 2)
        if (found := _compare(axis, first, second, by_axis[axis.name], key))
    ]
    ratings = [_rated(axis.name, by_axis[axis.name], key) for axis in judged] if len(key.systems) > 2 else []
    return JudgedScore(systems=key.systems, comparisons=comparisons, ratings=ratings, raters=raters)


def _compare(
    axis: Axis, first: str, second: str, votes: dict[str, list[Vote]], key: Judgement
) -> Comparison | None:  # fmt: skip
    asked = [pair for pair in key.pairs.values() if pair.scored and {pair.left, pair.right} == {first, second}]
    pairs = [pair for pair in asked if pair.name in votes]
    if not pairs:
        return None
    counts = np.array([_counts(votes[pair.name], pair, first) for pair in pairs])
    first_left = np.array([pair.left == first for pair in pairs])
    reasons = {
        name: (_named(name, first, pairs, votes), _named(name, second, pairs, votes)) for name in axis.reasons
    }  # fmt: skip
    groups = {
        name: np.array([each == name for each in names])
        for names in ([pair.concept for pair in pairs], [pair.motion for pair in pairs])
        for name in dict.fromkeys(filter(None, names))
    }
    strata = [(pair.concept, pair.motion) for pair in pairs]
    net, by_group = net_wins(counts, first_left, strata, groups)
    return Comparison(
        axis=axis.name,
        first=first,
        second=second,
        net=net,
        votes=int(counts.sum()),
        short=int((counts.sum(1) < axis.raters).sum()),
        unjudged=len(asked) - len(pairs),
        agreement=alpha(dict(zip(("first", "tie", "second"), row, strict=True)) for row in counts.tolist()),
        reasons=reasons,
        groups=by_group,
    )


def _counts(votes: list[Vote], pair: ShownPair, first: str) -> tuple[int, int, int]:
    systems = Counter(preferred_system(vote, pair) for vote in votes)
    return systems[first], systems[""], len(votes) - systems[first] - systems[""]


def _named(reason: str, system: str, pairs: list[ShownPair], votes: dict[str, list[Vote]]) -> int:
    return sum(
        vote.reason == reason and preferred_system(vote, pair) == system for pair in pairs for vote in votes[pair.name]
    )


def _rated(axis: str, votes: dict[str, list[Vote]], key: Judgement) -> AxisRatings:
    """Every pair counts as one game, of which each vote decides its share."""
    systems, prompts = [*key.systems], {pair.prompt: i for i, pair in enumerate(key.pairs.values())}
    won = np.zeros((len(key.pairs), len(systems), len(systems)))
    for name, given in votes.items():
        pair = key.pairs[name]
        i, j = systems.index(pair.left), systems.index(pair.right)
        left, tie, right = _counts(given, pair, pair.left)
        won[prompts[pair.prompt], i, j] += (left + tie / 2) / len(given)
        won[prompts[pair.prompt], j, i] += (right + tie / 2) / len(given)
    why = why_unrated(systems, won)
    return AxisRatings(axis=axis, ratings=[] if why else elo_ratings(systems, won), why=why)
