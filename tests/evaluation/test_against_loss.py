"""Validation losses beside net wins: who is said to win, in which direction, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged import key_of, votes_for, written
from PIL import Image
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.against_loss import against_loss
from cinemesh.evaluation.score import score_votes
from cinemesh.evaluation.votes import Answer, Vote
from cinemesh.launch.cli import app

FOUR = ("a", "b", "c", "d")


def shown(path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["judge", "score", str(path), *options])
    assert done.exit_code == 0, done.exception or done.output
    return done.stdout


def refused(path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["judge", "score", str(path), *options])
    assert isinstance(done.exception, CinemeshError), done.output
    return str(done.exception)


def of_two(tmp_path: Path) -> Path:
    """A prompt in four is lost by "new": it wins by 60 points of 100, whatever side it stands on."""
    key = key_of(40, checks=False)
    votes = votes_for(key, "new")
    votes = [
        v
        if int(v.pair[1:]) % 5
        else Vote(v.pair, v.rater, v.axis, Answer.LEFT if v.answer == "right" else Answer.RIGHT)
        for v in votes
    ]
    return written(tmp_path, key, votes)


@pytest.mark.parametrize(("new", "old", "lower", "win"), [(0.9, 1.1, "new", 0.6), (1.1, 0.9, "old", -0.6)])
def test_the_net_win_is_of_the_system_with_the_lower_loss(
    tmp_path: Path, new: float, old: float, lower: str, win: float
) -> None:
    given = ("--loss", f"new={new}", "--loss", f"old={old}")
    path = of_two(tmp_path)
    found: dict[str, Any] = json.loads(shown(path, "--json", *given))
    ((axis,), net) = found["against_loss"], found["comparisons"][0]["net"]
    (pair,) = axis["pairs"]
    assert axis["axis"] == "overall" and axis["rank_correlation"] is None
    assert pair["lower"] == lower and pair["gap"] == pytest.approx(0.2) and pair["net_win"] == pytest.approx(win)
    assert pair["low"] < pair["net_win"] < pair["high"]
    ends = [net["low"], net["high"]]
    assert [pair["low"], pair["high"]] == (ends if lower == "new" else [-end for end in reversed(ends)])
    assert f"{win * 100:+.1f}" in shown(path, *given)
    assert json.loads(shown(path, "--json"))["against_loss"] == []


def test_ranks_are_those_of_scipy() -> None:
    """Four systems, six pairs, some with equal net wins and some with equal gaps."""
    from scipy.stats import rankdata

    key = key_of(12, FOUR, checks=False)
    prefer = {
        frozenset("ab"): "a",
        frozenset("ac"): "a",
        frozenset("bc"): "c",
        frozenset("ad"): "",
        frozenset("bd"): "d",
    }
    votes = []
    for number, (name, pair) in enumerate(key.pairs.items()):
        wins = prefer.get(frozenset((pair.left, pair.right)), "c" if number % 3 else "d")
        answer = Answer.LEFT if wins == pair.left else Answer.RIGHT if wins == pair.right else Answer.TIE
        votes += [Vote(name, rater, "overall", answer) for rater in "xyz"]
    losses = {"a": 1.0, "b": 1.25, "c": 1.5, "d": 1.75}
    (found,) = against_loss(score_votes(votes, key), losses)
    gaps, wins = [pair.gap for pair in found.pairs], [pair.net_win for pair in found.pairs]
    assert len(found.pairs) == 6 and len({*gaps}) == 3 and len({*wins}) < 6
    assert found.rank_correlation == pytest.approx(np.corrcoef(rankdata(gaps), rankdata(wins))[0, 1])


def test_losses_against_net_wins_are_drawn(tmp_path: Path) -> None:
    path = of_two(tmp_path)
    shown(path, "--loss", "new=0.9", "--loss", "old=1.1", "--plot", str(tmp_path / "drawn.png"))
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.format == "PNG" and len(drawn.getcolors(1 << 24) or ()) > 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--loss", "new"), "--loss 'new' is no SYSTEM=LOSS"),
        (("--loss", "=1"), "is no SYSTEM=LOSS"),
        (("--loss", "new=low"), "is no SYSTEM=LOSS"),
        (("--loss", "new=1", "--loss", "new=2"), "says twice what the loss of new is"),
        (("--loss", "nwe=1", "--loss", "old=2"), "no system is called so; did you mean 'new'"),
        (("--loss", "new=nan", "--loss", "old=2"), "it is no finite number"),
        (("--loss", "new=1"), "no judged pair has both of its systems among them"),
        (("--plot", "x.png"), "add --loss SYSTEM=LOSS"),
        (("--loss", "new=1", "--loss", "old=2", "--plot", "x.pdf"), "is no .png file"),
        (("--loss", "new=1", "--loss", "old=2", "--plot", "/proc/x.png"), "--plot"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    assert said in refused(of_two(tmp_path), *options)
