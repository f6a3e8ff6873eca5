"""The net win rate against known raters: its rule, its expectation, its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from judged import honest_net_win, preferences, vote
from numpy.typing import NDArray

from cinemesh.evaluation import net_win as module
from cinemesh.evaluation.net_win import majority, net_win, net_wins

BIAS = 0.1


@pytest.mark.parametrize(
    ("votes", "wins"),
    [
        *(((3, 0, 0), 1), ((0, 0, 3), -1), ((2, 1, 0), 1), ((1, 0, 2), -1), ((1, 1, 1), 0), ((1, 2, 0), 0)),
        *(((1, 0, 1), 0), ((3, 0, 3), 0), ((3, 3, 0), 0), ((3, 1, 2), 1), ((2, 2, 2), 0), ((1, 0, 0), 1)),
    ],
)
def test_a_majority_is_the_answer_that_most_gave(votes: tuple[int, int, int], wins: int) -> None:
    """An even number split in halves is a tie: only this pins what the page and the table state."""
    assert majority(*votes) == wins


@pytest.mark.parametrize("raters", [1, 2, 3, 4, 6])
def test_biased_votes_have_the_honest_majority_for_expectation(raters: int) -> None:
    """Exactly, summed over every outcome, on either side; plain majorities miss it by up to a few points."""
    honest = np.array([[0.6, 0.15, 0.25]])
    worst = 0.0
    for sign in (1, -1):
        biased = honest + sign * np.array([BIAS, 0.0, -BIAS])
        mended = plain = 0.0
        for first in range(raters + 1):
            for tie in range(raters - first + 1):
                second = raters - first - tie
                chance = math.factorial(raters) * math.prod(
                    p**n / math.factorial(n) for p, n in zip(biased[0], (first, tie, second), strict=True)
                )
                powers = module._honest_majority(first, tie, second)
                mended += chance * sum(c * (sign * BIAS) ** d for d, c in enumerate(powers))
                plain += chance * majority(first, tie, second)
        truth = honest_net_win(honest, raters)[0]
        assert mended == pytest.approx(truth, abs=1e-12)
        worst = max(worst, abs(plain - truth))
    assert worst > 0.05


def simulated(mean: float, prompts: int, runs: int, bias: float = BIAS) -> list[tuple[module.NetWin, float]]:
    """Net wins of three raters on prompts drawn anew each time, and the truth of the prompts' population."""
    random = np.random.Generator(np.random.Philox(key=7))
    truth = float(honest_net_win(preferences(mean, 200_000, random), 3).mean())
    return [
        (net_win(*vote(preferences(mean, prompts, random), bias, 3, random), seed=run), truth) for run in range(runs)
    ]


def test_a_side_bias_is_estimated_and_removed() -> None:
    """Even where a system stands left four times out of five, which alone would lift it by 6 points."""
    random = np.random.Generator(np.random.Philox(key=3))
    of = preferences(0.7, 20_000, random)
    left = random.random(len(of)) < 0.8
    shift = np.where(left, BIAS, -BIAS)
    votes = random.multinomial(3, of + np.column_stack([shift, 0 * shift, -shift]))
    found = net_win(votes, left)
    truth = float(honest_net_win(of, 3).mean())
    assert found.side_bias == pytest.approx(BIAS, abs=0.01) and found.deviation is not None
    assert found.value == pytest.approx(truth, abs=4 * found.deviation)
    assert (found.wins - found.losses) / found.prompts - truth > 0.05  # as it was voted
    mirrored = net_win(votes[:, ::-1], ~left)
    assert mirrored.value == pytest.approx(-found.value, abs=1e-12)


def test_a_system_against_itself_wins_nothing() -> None:
    found = simulated(0.5, 381, 40)
    values = [net.value for net, _ in found]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values)) and found[0][1] == pytest.approx(
        0, abs=5e-3
    )
    identical = net_win(np.tile([0, 3, 0], (10, 1)), np.arange(10) % 2 == 0)
    assert (identical.value, identical.low, identical.high, identical.side_bias) == (0, 0, 0, 0)


def test_the_interval_covers_the_truth() -> None:
    """A cut of tests/benchmarks/judged_coverage.py, to 3 std of its 400 runs: only here is an interval too short."""
    found = simulated(0.65, 50, 400)
    inside = np.mean([net.low <= truth <= net.high for net, truth in found if net.low is not None and net.high])
    assert 0.95 - 0.033 <= inside <= 0.95 + 0.033


def by_hand(votes: NDArray[np.integer], left: NDArray[np.bool_]) -> Callable[[NDArray[np.integer]], float]:
    """The estimate of the prompts of an index, with one polynomial a prompt."""

    def estimate(index: NDArray[np.integer]) -> float:
        v, side = votes[index], left[index]
        net = (v[:, 0] - v[:, 2]) / v.sum(1)
        b = (net[side].mean() - net[~side].mean()) / 4
        worth = [
            sum(c * (b if s else -b) ** d for d, c in enumerate(module._honest_majority(*row)))
            for row, s in zip(v.tolist(), side, strict=True)
        ]
        return float((np.mean(np.array(worth)[side]) + np.mean(np.array(worth)[~side])) / 2)

    return estimate


def test_the_bootstrap_draws_prompts() -> None:
    """Kinds of prompts drawn together give the spread of prompts drawn one by one, to a bootstrap's own noise."""
    random = np.random.Generator(np.random.Philox(key=5))
    votes, left = vote(preferences(0.6, 60, random), BIAS, 3, random)
    estimate = by_hand(votes, left)
    found = net_win(votes, left)
    assert found.value == pytest.approx(estimate(np.arange(60)), abs=1e-12) and found.deviation is not None
    drawn = [estimate(random.integers(0, 60, 60)) for _ in range(600)]
    assert found.deviation == pytest.approx(np.std(drawn) * math.sqrt(60 / 59), rel=0.12)


def test_prompts_that_are_still_needed() -> None:
    """Half the deviation takes four times the prompts."""
    random = np.random.Generator(np.random.Philox(key=9))
    votes, left = vote(preferences(0.6, 100, random), 0.0, 3, random)
    found = net_win(votes, left)
    assert found.deviation is not None and 0.05 < found.deviation < 0.12
    assert found.more_prompts(found.deviation / 2) == pytest.approx(300, abs=1)
    assert found.more_prompts(1.0) == 0


def test_nothing_is_won_beyond_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one side's prompts are won by all raters and the other's by most, less the bias is more than all."""
    left = np.arange(14) % 2 == 0
    votes = np.array([[0, 0, 3] if side else [0, 1, 2] for side in left])
    found = net_win(votes, left)
    assert found.low is not None and -1 == found.value == found.low <= found.high  # type: ignore[operator]
    assert found.side_bias == pytest.approx(-1 / 12)
    monkeypatch.setattr(module, "_share", float)
    assert net_win(votes, left).value < -1.001


def test_too_few_prompts_have_no_interval_and_no_side_bias() -> None:
    one = net_win(np.array([[2, 0, 1]]), np.array([True]))
    assert (one.value, one.low, one.high, one.deviation, one.side_bias, one.more_prompts(0.1)) == (1, *[None] * 5)
    one_side = net_win(np.array([[3, 0, 0], [0, 0, 3], [3, 0, 0]]), np.array([True, True, True]))
    assert one_side.side_bias is None and one_side.value == pytest.approx(1 / 3)


def stratified_bench(random: np.random.Generator, each: int = 4) -> tuple[Any, ...]:
    """Prompts of 12 strata that raters see differently, votes without bias, and the truth of their population."""
    means = np.linspace(0.2, 0.9, 12)
    of = np.concatenate([preferences(mean, each, random) for mean in means])
    return (*vote(of, 0.0, 3, random), [n // each for n in range(len(of))])


def test_strata_are_no_chance() -> None:
    """Only here is an interval too wide that takes the differences of strata for noise."""
    random = np.random.Generator(np.random.Philox(key=11))
    means = np.linspace(0.2, 0.9, 12)
    truth = float(np.mean([honest_net_win(preferences(mean, 200_000, random), 3).mean() for mean in means]))
    inside, widths = 0, np.zeros(2)
    for run in range(300):
        votes, left, strata = stratified_bench(random)
        net, other = net_wins(votes, left, strata, {}, seed=run)[0], net_win(votes, left, seed=run)
        assert net.value == pytest.approx(other.value, abs=1e-12)
        assert net.low is not None and net.high is not None and other.low is not None and other.high is not None
        inside += net.low <= truth <= net.high
        widths += net.high - net.low, other.high - other.low
    assert 0.95 - 0.04 <= inside / 300 <= 0.95 + 0.04
    assert widths[0] < 0.93 * widths[1]


def test_a_group_is_its_own_prompts() -> None:
    """Counts, value and side bias of a mask are those of its prompts alone; its deviation too, but for the draws."""
    random = np.random.Generator(np.random.Philox(key=13))
    votes, left, strata = stratified_bench(random, 20)
    mask = np.array(strata) < 6
    whole, groups = net_wins(votes, left, strata, {"low": mask, "high": ~mask})
    alone, _ = net_wins(votes[mask], left[mask], [s for s in strata if s < 6], {})
    found = groups["low"]
    assert (found.prompts, found.wins, found.ties, found.losses) == (120, alone.wins, alone.ties, alone.losses)
    assert found.value == pytest.approx(alone.value, abs=1e-12) and found.side_bias == pytest.approx(alone.side_bias)
    assert found.deviation == pytest.approx(alone.deviation, rel=0.1)
    assert found.wins + groups["high"].wins == whole.wins and groups["high"].value > found.value


@pytest.mark.parametrize("sizes", [(1,) * 40, (1, 39), (1, 1, 38), (2,) * 20])
def test_strata_of_one_prompt_are_drawn_from_together(sizes: tuple[int, ...]) -> None:
    """They would never vary: a bench whose prompts each have a concept of their own has an interval all the same."""
    random = np.random.Generator(np.random.Philox(key=17))
    votes, left = vote(preferences(0.6, 40, random), 0.0, 3, random)
    strata = [i for i, size in enumerate(sizes) for _ in range(size)]
    found, plain = net_wins(votes, left, strata, {})[0], net_win(votes, left)
    assert found.deviation is not None and plain.deviation is not None
    assert 0.6 * plain.deviation < found.deviation < 1.4 * plain.deviation
