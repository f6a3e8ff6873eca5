"""Votes as they come in: each is on the disk before it is confirmed, and what a rater has still to judge.

Several raters, and several servers of one folder, may vote at once: the file is locked for each line. A crash in the
middle of a line loses that vote alone: the next one cuts the torn line off.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ..errors import CinemeshError
from .blinding import BlindPairs
from .votes import VOTES_FILE, Vote, read_given_votes, vote_of


class BallotBox:
    """The file of votes of a folder of pairs."""

    def __init__(self, folder: Path, shown: BlindPairs) -> None:
        self._path = folder / VOTES_FILE
        self._pairs = {pair.name: pair for pair in shown.pairs}
        self._axes = {axis.name: axis for axis in shown.axes}
        self._lock = Lock()
        try:
            self._file = open(self._path, "a+b")  # noqa: SIM115  held until the server ends
        except OSError as error:
            raise CinemeshError(
                f"cannot write {self._path}: {error.strerror}", remedy="see to the folder's permissions"
            ) from error
        with self._locked():
            self._mend()
        votes = read_given_votes(self._path, self._pairs, self._axes)
        self._votes = {(vote.pair, vote.axis, vote.rater): vote for vote in votes}

    def close(self) -> None:
        self._file.close()

    def add(self, row: object) -> Vote:
        """Write a vote as JSON has it, and wait for the disk. Raises CinemeshError for one of another folder."""
        vote = vote_of(row, "the vote", self._pairs, self._axes)
        with self._locked():
            self._mend()
            self._file.write(vote.line().encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._votes[vote.pair, vote.axis, vote.rater] = vote
        return vote

    def of(self, rater: str) -> dict[str, dict[str, Vote]]:
        """What the rater has voted: pair -> axis -> vote."""
        found: dict[str, dict[str, Vote]] = {}
        with self._lock:
            for (pair, axis, name), vote in self._votes.items():
                if name == rater:
                    found.setdefault(pair, {})[axis] = vote
        return found

    def open_to(self, rater: str) -> list[tuple[str, str]]:
        """(pair, axis) in their order, of those the rater voted on and those that still want a vote of somebody."""
        with self._lock:
            counts = Counter((pair, axis) for pair, axis, name in self._votes if name != rater)
        return [
            (pair, axis.name)
            for pair in self._pairs
            for axis in self._axes.values()
            if counts[pair, axis.name] < axis.raters
        ]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Against other threads, and other servers of the folder."""
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _mend(self) -> None:
        """Cut off what a crash left of a line."""
        end = self._file.seek(0, os.SEEK_END)
        kept = end
        while kept:
            start = max(0, kept - 4096)
            self._file.seek(start)
            newline = self._file.read(kept - start).rfind(b"\n")
            if newline >= 0:
                kept = start + newline + 1
                break
            kept = start
        if kept < end:
            self._file.truncate(kept)
        self._file.seek(0, os.SEEK_END)
