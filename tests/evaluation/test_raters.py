"""Agreement against published values, and the audit of raters that are known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from judged import key_of, votes_for

from cinemesh.evaluation.raters import alpha, audit, two_sided
from cinemesh.evaluation.votes import Answer, Vote

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), its example of four observers, and that of three
# coders in the encyclopedias; a point: no answer.
FOUR = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")

THREE = (".....34121133.3", "1.213343.......", "..21344.21133.4")


def units(rows: tuple[str, ...]) -> list[Counter[str]]:
    return [Counter(sign for sign in column if sign != ".") for column in zip(*rows, strict=True)]


def test_alpha_is_that_of_published_examples() -> None:
    assert alpha(units(FOUR)) == pytest.approx(0.743, abs=5e-4)
    assert alpha(units(THREE)) == pytest.approx(0.691, abs=5e-4)


def test_alpha_of_chance_agreement_and_of_nothing() -> None:
    random = np.random.Generator(np.random.Philox(key=1))
    by_chance = [Counter(random.choice(["a", "b"], 3).tolist()) for _ in range(4000)]
    assert alpha(by_chance) == pytest.approx(0.0, abs=0.03)
    assert alpha([{"a": 3}, {"b": 3}]) == 1.0
    assert alpha([{"a": 1, "b": 1}] * 10) == pytest.approx(-0.9, abs=1e-12)  # 1 - 19 * 20 / 200
    assert alpha([{"a": 1}, {"b": 1}]) is None and alpha([{"a": 3}]) is None


def test_a_rater_who_always_presses_left_is_left_out_by_name() -> None:
    """And one who prefers the system that happens to stand left half of the time is not."""
    key = key_of(30)
    votes = votes_for(key, "new", raters=("honest",))
    votes += [Vote(name, "lazy", "overall", Answer.LEFT) for name in key.pairs]
    honest, lazy = audit(votes, key)
    assert (honest.name, honest.left_out, honest.notes) == ("honest", "", [])
    assert lazy.left_out == "presses left whatever is shown: 32 of 32 decided votes"
    few = audit([Vote(f"p{n}", "new here", "overall", Answer.LEFT) for n in range(6)], key)[0]
    assert few.left_out == "" and few.notes == []


def test_a_lean_is_noted_and_counts() -> None:
    """80 of 100 is no chance, and no reason to drop a person."""
    key = key_of(100, checks=False)
    votes = [Vote(f"p{n}", "x", "overall", Answer.RIGHT if n % 5 else Answer.LEFT) for n in range(100)]
    rater = audit(votes, key)[0]
    assert rater.left_out == "" and rater.notes == ["leans to the right: 20 of 100 decided votes".replace("20", "80")]
    assert two_sided(5, 10) == 1.0 and two_sided(0, 10) == pytest.approx(2 / 1024)


def test_checks_find_who_prefers_itself_and_who_changes() -> None:
    """Four axes: four votes on the identical pair, four on the repeated one."""
    key = key_of(4)
    axes = ("overall", "consistency", "completeness", "naturalness")
    steady = [vote for axis in axes for vote in votes_for(key, "new", axis, ("steady",))]
    fickle = [
        Vote(vote.pair, "fickle", vote.axis, Answer.LEFT if vote.pair in ("same", "again", "p0") else vote.answer)
        for vote in steady
    ]
    found = {rater.name: rater for rater in audit([*steady, *fickle], key)}
    assert found["steady"].notes == [] and found["steady"].repeated == found["steady"].identical == 4
    assert found["fickle"].notes == [
        "prefers one of two identical clips: 4 of 4 times",
        "votes otherwise when a pair comes again: 4 of 4 times",
    ]
