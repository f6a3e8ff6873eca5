"""From files of votes to the table: every number that it prints, of votes that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged import key_of, preferences, votes_for, written
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.score import score_votes
from cinemesh.evaluation.votes import Answer, Judgement, Vote
from cinemesh.launch.cli import app


def shown(path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["judge", "score", str(path), *options])
    assert done.exit_code == 0, done.exception or done.output
    return done.stdout


def values(path: Path, *options: str) -> dict[str, Any]:
    return json.loads(shown(path, "--json", *options))


def test_a_system_that_everybody_prefers_wins_everything(tmp_path: Path) -> None:
    """Checks count nowhere but in the audit: neither the identical nor the repeated pair is a prompt."""
    key = key_of(10)
    found = values(written(tmp_path, key, votes_for(key, "new")))
    assert found["systems"] == {"new": 1, "old": 1} and found["ratings"] == []
    (row,) = found["comparisons"]
    net = row["net"]
    assert (row["axis"], row["first"], row["second"]) == ("overall", "new", "old")
    assert (net["prompts"], net["wins"], net["ties"], net["losses"], row["votes"]) == (10, 10, 0, 0, 30)
    assert net["value"] == pytest.approx(1) and net["side_bias"] == pytest.approx(0) and row["more_prompts"] == 0
    assert row["short"] == row["unjudged"] == 0 and row["agreement"] is None  # all answers are one
    assert {name: group["prompts"] for name, group in row["groups"].items()} == {"human": 10, "low": 5, "high": 5}
    assert [rater["votes"] for rater in found["raters"]] == [12, 12, 12]


def test_systems_on_either_side_are_told_apart() -> None:
    """A preference for the left side is none for a system, whatever stands there."""
    key = key_of(10, checks=False)
    votes = [Vote(name, "x", "overall", Answer.LEFT) for name in key.pairs]
    (row,) = score_votes(votes, key).comparisons
    assert (row.net.wins, row.net.losses, row.net.value) == (5, 5, 0.0)
    assert row.net.side_bias == 0.5 and row.short == 10


def test_a_rater_who_is_left_out_counts_nowhere_and_is_named(tmp_path: Path) -> None:
    key = key_of(30)
    lazy = [Vote(name, "lazy", "overall", Answer.LEFT) for name in key.pairs]
    path = written(tmp_path, key, [*votes_for(key, "old", raters=("a", "b")), *lazy])
    assert values(path)["comparisons"][0]["votes"] == 60
    assert "LEFT OUT: presses left whatever is shown: 32 of 32 decided votes" in shown(path)
    with pytest.raises(CinemeshError, match="no vote is left to count: lazy presses left whatever is shown"):
        score_votes(lazy, key)


def test_missing_votes_reasons_and_ties_are_counted(tmp_path: Path) -> None:
    """Two votes that differ are a tie; a pair without votes is none of the prompts."""
    key = key_of(4, checks=False)
    new, old = Answer.RIGHT, Answer.LEFT  # of p0 and p2
    votes = [
        Vote("p0", "a", "alignment", new, "motion"),
        Vote("p0", "b", "alignment", old, "subject"),
        Vote("p2", "a", "alignment", new, "motion"),
        Vote("p2", "b", "alignment", new, "subject"),
        Vote("p2", "c", "alignment", Answer.TIE),
    ]
    (row,) = values(written(tmp_path, key, votes))["comparisons"]
    assert (row["net"]["wins"], row["net"]["ties"], row["net"]["losses"]) == (1, 1, 0)
    assert row["short"] == 1 and row["unjudged"] == 2 and row["reasons"] == {"subject": [1, 1], "motion": [2, 0]}
    text = shown(tmp_path / "votes.jsonl")
    assert (
        "alignment, new and old: 1 prompts have fewer votes than the axis wants and count as they are; 2 have none"
        in text
    )
    assert "subject 1:1, motion 2:0" in text


def test_three_systems_are_rated_and_a_pick_is_marked(tmp_path: Path) -> None:
    key = key_of(6, ("a", "b", "c"), checks=False)
    key = Judgement(key.media, key.axes, {"a": 1, "b": 4, "c": 1}, key.pairs)
    votes = [
        Vote(pair.name, rater, "overall", Answer.TIE if rater == "z" else
             Answer.LEFT if pair.left < pair.right else Answer.RIGHT)
        for pair in key.pairs.values() for rater in "xyz"
    ]  # fmt: skip
    found = values(written(tmp_path, key, votes))
    assert [(row["first"], row["second"]) for row in found["comparisons"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    ratings = found["ratings"][0]["ratings"]
    assert [each["system"] for each in ratings] == ["a", "b", "c"]
    # (2 votes of 3, and half of the tie): the middle one wins as often as it loses, so that it has the mean.
    assert ratings[1]["rating"] == pytest.approx(1000, abs=1e-6) and ratings[0]["rating"] > 1100
    text = shown(tmp_path / "votes.jsonl")
    assert "b: the best of 4 clips of every prompt" in text and "Bradley and Terry's" in text
    won = [Vote(vote.pair, vote.rater, vote.axis, vote.answer) for vote in votes if vote.rater != "z"]
    written(tmp_path, key, won)
    assert "overall: no rating, since b, and what it won against, never won or tied against a" in shown(
        tmp_path / "votes.jsonl"
    )


PARTS = (
    *("axis  ", "overall  new  old  ", "won, tied, lost: ", "net win by  of  over  human  ", "in brackets: "),
    *("rater  votes  decided  left  identical  repeated  audit", "a  ", "decided: "),
)


def test_the_table_has_all_its_parts(tmp_path: Path) -> None:
    key = key_of(100)
    random = np.random.Generator(np.random.Philox(key=2))
    votes = []
    for pair, of in zip(key.pairs.values(), preferences(0.6, len(key.pairs), random), strict=True):
        for rater in "abc":
            answer = ("new", "", "old")[random.choice(3, p=of)]
            side = Answer.TIE if not answer else Answer.LEFT if answer == pair.left else Answer.RIGHT
            votes.append(Vote(pair.name, rater, "overall", side))
    path = written(tmp_path, key, votes)
    lines = iter([" ".join(line.split()) for line in shown(path, "--deviation", "5").splitlines()])
    for part in PARTS:
        assert any(" ".join(part.split()) in line for line in lines), part
    row = values(path, "--deviation", "5")["comparisons"][0]
    group = row["groups"]["high"]
    assert group["more_prompts"] == pytest.approx(50 * (group["deviation"] / 0.05) ** 2 - 50, abs=1)
    assert f"(50, {group['more_prompts']} more)" in shown(path, "--deviation", "5")
    assert row["more_prompts"] == pytest.approx(100 * (row["net"]["deviation"] / 0.05) ** 2 - 100, abs=1)


def test_votes_without_a_key_are_refused_in_a_line(tmp_path: Path) -> None:
    key = key_of()
    path = written(tmp_path, key, votes_for(key, "new"))
    (tmp_path / "key.json").rename(tmp_path / "other.json")
    refused = CliRunner().invoke(app, ["judge", "score", str(path)])
    assert isinstance(refused.exception, CinemeshError) and "cannot read the key" in str(refused.exception)
    assert shown(path, "--key", str(tmp_path / "other.json"))
