"""Ratings of more than two systems from their pairs: Bradley and Terry's model, on the scale of Elo.

P(i is preferred to j) = 1 / (1 + 10 ** ((rating j - rating i) / 400)); a tie is half of each. The ratings are the most
likely ones, with the mean at ``MEAN``; their deviations count a prompt's votes as one draw (the sandwich estimator,
clustered by prompt).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .net_win import LEVEL

MEAN = 1000.0  # of all ratings
SCALE = 400 / math.log(10)  # of Elo: points of one unit of log odds
STEPS = 100  # of Newton's method, which ends long before
SMALL = 1e-10  # of its last step, log odds


@dataclass(frozen=True)
class Rating:
    """``low`` to ``high``: a 95 % interval of the rating, against the mean of all."""

    system: str
    rating: float
    low: float
    high: float


def elo_ratings(systems: Sequence[str], won: NDArray[np.floating]) -> list[Rating]:
    """The best first. ``won`` [prompts, systems, systems]: how often the row's system won against the column's.

    ``why_unrated`` must have nothing to say.
    """
    total = won.sum(0)
    assert not why_unrated(systems, won)
    beta = np.zeros(len(systems))
    met = total + total.T
    for _ in range(STEPS):
        expected = _expected(beta)
        step = _inverse(met, expected) @ (total - met * expected).sum(1)
        step /= max(1.0, float(np.abs(step).max()))  # far from the top, Newton's step may pass it
        beta += step
        if np.abs(step).max() < SMALL:
            break
    beta -= beta.mean()
    expected = _expected(beta)
    scores = (won - (won + won.transpose(0, 2, 1)) * expected).sum(2)
    inverse = _inverse(met, expected)
    spread = NormalDist().inv_cdf(0.5 + LEVEL / 2) * np.sqrt(np.diag(inverse @ (scores.T @ scores) @ inverse))
    found = [
        Rating(system, *(MEAN + SCALE * float(value) for value in (b, b - s, b + s)))
        for system, b, s in zip(systems, beta, spread, strict=True)
    ]
    return sorted(found, key=lambda each: -each.rating)


def _expected(beta: NDArray[np.floating]) -> NDArray[np.floating]:
    """[systems, systems]: the probability that the row's system wins against the column's."""
    return 1 / (1 + np.exp(beta[None, :] - beta[:, None]))


def _inverse(met: NDArray[np.floating], expected: NDArray[np.floating]) -> NDArray[np.floating]:
    """Of the curvature of the log likelihood; the sum of all ratings is free, and stays."""
    weight = met * expected * expected.T
    return np.linalg.pinv(np.diag(weight.sum(1)) - weight)


def why_unrated(systems: Sequence[str], won: NDArray[np.floating]) -> str:
    """Why no finite ratings are the likeliest, "" where some are: each system must reach each other over wins."""
    reach = (won.sum(0) > 0) | np.eye(len(systems), dtype=bool)
    for _ in systems:
        reach = reach @ reach
    for i, system in enumerate(systems):
        if others := [name for name, can in zip(systems, reach[i], strict=True) if not can]:
            return f"{system}, and what it won against, never won or tied against {', '.join(others)}"
    return ""
