"""Bradley and Terry's ratings against closed forms and a known strength."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cinemesh.evaluation.ratings import MEAN, elo_ratings, why_unrated


def games(strengths: tuple[float, ...], prompts: int, seed: int = 1) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=seed))
    won = np.zeros((prompts, len(strengths), len(strengths)))
    for i in range(len(strengths)):
        for j in range(i):
            first = random.random(prompts) < 1 / (1 + 10 ** ((strengths[j] - strengths[i]) / 400))
            won[first, i, j] = won[~first, j, i] = 1
    return won


def test_two_systems_have_the_odds_of_their_games() -> None:
    """3 to 1 are 400 log10(3) points; a tie is half of each."""
    won = np.zeros((4, 2, 2))
    won[:2, 0, 1] = 1
    won[2] = won[3] = [[0, 0.5], [0.5, 0]]
    better, worse = elo_ratings(["a", "b"], won)
    assert (better.system, worse.system) == ("a", "b")
    assert better.rating - worse.rating == pytest.approx(400 * math.log10(3), abs=1e-6)
    assert better.rating + worse.rating == pytest.approx(2 * MEAN, abs=1e-9)


def test_known_strengths_lie_in_their_intervals() -> None:
    """100 runs of four systems on 300 prompts: 95 % of 400 intervals, to 3 std (their errors are correlated)."""
    strengths = (1180.0, 1050.0, 980.0, 790.0)
    inside = 0
    for seed in range(100):
        found = {each.system: each for each in elo_ratings(list("abcd"), games(strengths, 300, seed))}
        inside += sum(found[s].low <= truth <= found[s].high for s, truth in zip("abcd", strengths, strict=True))
    assert 0.92 <= inside / 400 <= 0.98


def test_prompts_judged_as_one_are_one_draw() -> None:
    """Every prompt's games four times over: the interval stays, where games counted one by one would halve it."""
    won = games((1050.0, 950.0, 1000.0), 200)
    once, again = elo_ratings(list("abc"), won), elo_ratings(list("abc"), 4 * won)
    for one, other in zip(once, again, strict=True):
        assert other.rating == pytest.approx(one.rating) and other.high - other.low == pytest.approx(one.high - one.low)


def test_systems_that_only_win_or_never_met_have_no_rating() -> None:
    won = games((1000.0, 1000.0, 1000.0), 20)
    assert why_unrated(list("abc"), won) == ""
    won[:, 2, :] = 0
    assert why_unrated(list("abc"), won) == "c, and what it won against, never won or tied against a, b"
