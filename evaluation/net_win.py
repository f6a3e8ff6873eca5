"""Net win rate of one system over another: majority of a prompt's votes, side bias removed, bootstrap over prompts.

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
    """From ``votes`` [prompts, 3]: how many raters preferred the first system, neither, the second one.

    ``first_left`` [prompts]: whether the first system stood left. Every prompt has a vote. ``seed`` of the bootstrap.
    """
    assert votes.shape == (len(first_left), 3) and len(votes) and (votes.sum(1) > 0).all(), votes.shape
    kinds, which, counts = np.unique(
        np.column_stack([first_left.astype(int), votes]), axis=0, return_inverse=True, return_counts=True
    )
    features = _features(kinds)
    arms = np.bincount(first_left, minlength=2)
    removable = bool((arms >= FEWEST_IN_ARM).all())
    value, side_bias = _estimate(counts[None], features, removable)
    wanted = np.array([majority(*map(int, row)) for row in kinds[:, 1:]])[which.reshape(-1)]
    n = len(votes)
    low = high = deviation = None
    if n >= FEWEST:
        # Prompts of one kind are alike, so that drawing n prompts is drawing how often each kind comes.
        random = np.random.Generator(np.random.Philox(key=seed))
        drawn, _ = _estimate(random.multinomial(n, counts / n, RESAMPLES), features, removable)
        tail = _tail(n)
        low, high = (float(end) for end in np.quantile(drawn, [tail, 1 - tail]))
        deviation = float(drawn.std() * math.sqrt(n / (n - 1)))
    return NetWin(
        prompts=n,
        wins=int((wanted > 0).sum()),
        ties=int((wanted == 0).sum()),
        losses=int((wanted < 0).sum()),
        value=float(value[0]),
        low=low,
        high=high,
        deviation=deviation,
        side_bias=float(side_bias[0]) if removable else None,
    )


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
    counts: NDArray[np.integer], features: NDArray[np.floating], removable: bool
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


def _tail(n: int) -> float:
    """The quantile of n prompts' bootstrap at which the interval begins.

    A bootstrap of n prompts is too narrow by sqrt((n - 1) / n), and by the normal's tail in place of Student's
    (Hesterberg, What Teachers Should Know about the Bootstrap, 2015: the expanded percentile interval).
    """
    z, df = NormalDist().inv_cdf(0.5 + LEVEL / 2), n - 1
    student = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)  # Cornish and Fisher
    return NormalDist().cdf(-student * math.sqrt(n / df))
