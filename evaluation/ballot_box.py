"""Votes as they come in, and what a rater has still to judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .blinding import BlindPairs
from .journal import Journal
from .votes import VOTES_FILE, Vote, read_given_votes, vote_of


class BallotBox:
    """The file of votes of a folder of pairs."""

    def __init__(self, folder: Path, shown: BlindPairs) -> None:
        path = folder / VOTES_FILE
        self._pairs = {pair.name: pair for pair in shown.pairs}
        self._axes = {axis.name: axis for axis in shown.axes}
        self._journal = Journal(path)
        votes = read_given_votes(path, self._pairs, self._axes)
        self._votes = {(vote.pair, vote.axis, vote.rater): vote for vote in votes}

    def close(self) -> None:
        self._journal.close()

    def add(self, row: object) -> Vote:
        """Write a vote as JSON has it, and wait for the disk. Raises CinemeshError for one of another folder."""
        vote = vote_of(row, "the vote", self._pairs, self._axes)
        with self._journal.lock:
            self._journal.add(vote.line())
            self._votes[vote.pair, vote.axis, vote.rater] = vote
        return vote

    def add_all(self, votes: Iterable[Vote]) -> int:
        """Write those that are not there as they are, in one piece; how many that were."""
        with self._journal.lock:
            new = [vote for vote in votes if self._votes.get((vote.pair, vote.axis, vote.rater)) != vote]
            if new:
                self._journal.add("".join(vote.line() for vote in new))
            self._votes |= {(vote.pair, vote.axis, vote.rater): vote for vote in new}
        return len(new)

    def of(self, rater: str) -> dict[str, dict[str, Vote]]:
        """What the rater has voted: pair -> axis -> vote."""
        found: dict[str, dict[str, Vote]] = {}
        with self._journal.lock:
            for (pair, axis, name), vote in self._votes.items():
                if name == rater:
                    found.setdefault(pair, {})[axis] = vote
        return found

    def open_to(self, rater: str) -> list[tuple[str, str]]:
        """(pair, axis) in their order, of those the rater voted on and those that still want a vote of somebody."""
        with self._journal.lock:
            counts = Counter((pair, axis) for pair, axis, name in self._votes if name != rater)
        return [
            (pair, axis.name)
            for pair in self._pairs
            for axis in self._axes.values()
            if counts[pair, axis.name] < axis.raters
        ]
