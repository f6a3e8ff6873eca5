"""Net win rate of one system over another: majority of a prompt's votes, side bias removed, bootstrap over prompts.

The bootstrap draws prompts within strata, concept and level of motion, of which a bench has a chosen number: how they
differ from each other is no chance.

The majority is the answer that more raters gave than any other; where no answer has the most (one each, or an even
number split in halves), it is a tie. Net win rate: prompts won less prompts lost, over all prompts; ties count there.

A rater's side bias b adds b to the probability of "left" and takes it from "right", on every prompt alike. Two things
follow. The arms, prompts with the first system left and with it right, are shifted against each other: they are
averaged with equal weights, and their difference in single votes estimates b. And the majority of biased votes is not
that of honest ones, even averaged over both arms (three raters at 70 %: 78.4 % of majorities, with b = 0.1 77.2 %).
So each vote stands for the honest probabilities of which it is an unbiased estimate, e - b (left - right), and the
majority is taken of their product: its expectation is the majority of raters without bias, whatever the prompts are,
as long as the raters of a prompt vote independently and b leaves no probability below 0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray

RESAMPLES = 2000  # of a bootstrap; an end of the interval then lies within 0.07 deviations (2 std) of its limit
LEVEL = 0.95  # of intervals
FEWEST_IN_ARM = 2  # prompts with the first system on one side, for the side bias to be estimated
FEWEST = 2  # prompts for an interval


@dataclass(frozen=True, kw_only=True)
class NetWin:
    """Of a first system over a second one. Rates and deviation are fractions of the prompts; None: too few prompts.

    ``wins``, ``ties``, ``losses``: prompts by the majority as it was voted. ``value``: the net win rate, and ``low``,
    ``high`` its interval, with ``side_bias`` removed where that could be estimated.
    """

    prompts: int
    wins: int
    ties: int
    losses: int
    value: float
    low: float | None
    high: float | None
    deviation: float | None
    side_bias: float | None

    def more_prompts(self, deviation: float) -> int | None:
        """Prompts still to be judged until the deviation of ``value`` is the given one: it falls with their root."""
        if self.deviation is None:
            return None
        return max(0, math.ceil(self.prompts * (self.deviation / deviation) ** 2 - self.prompts))


def majority(first: int, tie: int, second: int) -> int:
    """1, 0 or -1: the first system wins, a tie, the second one wins, from how many raters gave each answer."""
    if first > max(tie, second):
        return 1
    return -1 if second > max(first, tie) else 0


def net_win(votes: NDArray[np.integer], first_left: NDArray[np.bool_], seed: int = 0) -> NetWin:
    """As ``net_wins``, of prompts without strata."""
    return net_wins(votes, first_left, [""] * len(votes), {}, seed)[0]


def net_wins(
    votes: NDArray[np.integer],
    first_left: NDArray[np.bool_],
    strata: Sequence[Hashable],
    groups: Mapping[str, NDArray[np.bool_]],
    seed: int = 0,
) -> tuple[NetWin, dict[str, NetWin]]:
    """Of all prompts, and of each group's, from ``votes`` [prompts, 3]: how many preferred first, neither, second.

    ``first_left`` [prompts]: whether the first system stood left. Every prompt has a vote. ``strata``: what a bench has
    as many prompts of as its author chose, concept and motion: the bootstrap draws within each. ``groups``: masks of
    prompts; a stratum lies within one or outside. ``seed`` of the bootstrap.
    """
    assert votes.shape == (len(first_left), 3) and len(votes) and (votes.sum(1) > 0).all(), votes.shape
    stratum, drawn_from = _strata(strata)
    table = np.column_stack([stratum, first_left.astype(int), votes])
    kinds, which, counts = np.unique(table, axis=0, return_inverse=True, return_counts=True)
    which, features = which.reshape(-1), _features(kinds[:, 1:])
    drawn_from = drawn_from[kinds[:, 0]]
    drawn = _drawn(drawn_from, counts, seed) if len(votes) >= FEWEST else None
    results = np.array([majority(*map(int, row)) for row in kinds[:, 2:]])

    def of(mask: NDArray[np.bool_]) -> NetWin:
        inside = np.bincount(which[mask], minlength=len(kinds))
        held = inside > 0
        assert (inside[held] == counts[held]).all(), "a stratum lies within a group, or outside"
        freedom = int(mask.sum()) - len(np.unique(drawn_from[held]))
        return _net_win(
            inside[held], first_left[mask], features[held], results[held],
            drawn[:, held] if drawn is not None else None, freedom,
        )  # fmt: skip

    return of(np.ones(len(votes), dtype=bool)), {name: of(mask) for name, mask in groups.items()}


def _net_win(
    counts: NDArray[np.integer],
    first_left: NDArray[np.bool_],
    features: NDArray[np.floating],
    results: NDArray[np.integer],
    drawn: NDArray[np.floating] | None,
    freedom: int,
) -> NetWin:
    """Of prompts of which each kind comes ``counts`` times, and ``drawn`` [draws, kinds] times in the bootstrap."""
    arms = np.bincount(first_left, minlength=2)
    removable = bool((arms >= FEWEST_IN_ARM).all())
    value, side_bias = _estimate(counts[None], features, removable)
    low = high = deviation = None
    if drawn is not None and freedom > 0:
        values, _ = _estimate(drawn[drawn.sum(1) > 0], features, removable)
        tail = _tail(freedom)
        low, high = (_share(end) for end in np.quantile(values, [tail, 1 - tail]))
        deviation = float(values.std())
    return NetWin(
        prompts=int(counts.sum()),
        wins=int(counts[results > 0].sum()),
        ties=int(counts[results == 0].sum()),
        losses=int(counts[results < 0].sum()),
        value=_share(value[0]),
        low=low,
        high=high,
        deviation=deviation,
        side_bias=float(side_bias[0]) if removable else None,
    )


def _share(estimated: float) -> float:
    """A net win rate: where nearly all is won, what is estimated without the side bias may lie beyond all."""
    return float(np.clip(estimated, -1.0, 1.0))


def _strata(names: Sequence[Hashable]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The number of each prompt's stratum, and by that number what it is drawn with: strata of one prompt together."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    of = np.array([number[name] for name in names])
    sizes = np.bincount(of)
    single = sizes == 1
    together = np.where(single, len(sizes), np.arange(len(sizes)))
    if single.sum() == 1:  # which has no other to be drawn with
        together[single] = int(np.argmax(sizes))
    return of, together


def _drawn(strata: NDArray[np.integer], counts: NDArray[np.integer], seed: int) -> NDArray[np.floating]:
    """[draws, kinds]: how often each kind comes when prompts are drawn anew within each stratum.

    Prompts of one kind are alike, so that drawing prompts is drawing how often each kind comes. Of the n of a stratum
    n - 1 are drawn, and stand for n: n draws would spread too little by (n - 1) / n (Rao and Wu, 1988).
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    drawn = np.zeros((RESAMPLES, len(counts)))
    for stratum in np.unique(strata):
        inside = strata == stratum
        n = int(counts[inside].sum())
        drawn[:, inside] = random.multinomial(n - 1, counts[inside] / n, RESAMPLES) * (n / (n - 1))
    return drawn


def _features(kinds: NDArray[np.integer]) -> NDArray[np.floating]:
    """[kinds, 2 arms, features]: of a prompt of each kind, one, its net vote, its honest majority as powers of b."""
    most = int(kinds[:, 1:].sum(1).max())
    features = np.zeros((len(kinds), 2, 2 + most + 1))
    for i, (left, first, tie, second) in enumerate(kinds.tolist()):
        powers = _honest_majority(first, tie, second)
        arm = features[i, left]
        arm[0], arm[1] = 1.0, (first - second) / (first + tie + second)
        arm[2 : 2 + len(powers)] = powers * (1.0 if left else -1.0) ** np.arange(len(powers))
    return features


def _estimate(
    counts: NDArray[np.number], features: NDArray[np.floating], removable: bool
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Net win rate and side bias [draws] from how often each kind came [draws, kinds]."""
    sums = np.tensordot(counts, features, axes=1)  # [draws, 2 arms, features]
    prompts = sums[..., 0]
    means = sums / np.maximum(prompts, 1)[..., None]
    both = (prompts > 0).all(1) & removable
    bias = np.where(both, (means[:, 1, 1] - means[:, 0, 1]) / 4, 0.0)  # net votes are shifted by 2 b, and by -2 b
    powers = bias[:, None] ** np.arange(features.shape[-1] - 2)
    arms = np.einsum("dap,dp->da", means[..., 2:], powers)
    whole = (arms * prompts).sum(1) / prompts.sum(1)
    return np.where(both, arms.mean(1), whole), bias


@cache
def _honest_majority(first: int, tie: int, second: int) -> NDArray[np.floating]:
    """Coefficients of b: the majority of these votes, each standing for the honest ones; the first system is left."""
    stands_for = {  # a vote -> the honest ones, as polynomials of b
        "first": ([1.0, -1.0], [0.0], [0.0, 1.0]),
        "tie": ([0.0, -1.0], [1.0], [0.0, 1.0]),
        "second": ([0.0, -1.0], [0.0], [1.0, 1.0]),
    }
    states: dict[tuple[int, int, int], NDArray[np.floating]] = {(0, 0, 0): np.ones(1)}
    for vote in ("first",) * first + ("tie",) * tie + ("second",) * second:
        after: dict[tuple[int, int, int], NDArray[np.floating]] = {}
        for (a, t, c), weight in states.items():
            for state, honest in zip(((a + 1, t, c), (a, t + 1, c), (a, t, c + 1)), stands_for[vote], strict=True):
                after[state] = polynomial.polyadd(after.get(state, np.zeros(1)), polynomial.polymul(weight, honest))
        states = after
    total = np.zeros(1)
    for state, weight in states.items():
        total = polynomial.polyadd(total, majority(*state) * weight)
    return total


def _tail(df: int) -> float:
    """The quantile of a bootstrap at which the interval begins, of ``df`` prompts more than strata.

    Student's tail in place of the normal's (Hesterberg, What Teachers Should Know about the Bootstrap, 2015).
    """
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    student = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)  # Cornish and Fisher
    return NormalDist().cdf(-student)
