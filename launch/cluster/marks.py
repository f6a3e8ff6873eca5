"""Where a rank stands, in a few machine words that a process beside it can read (torch-free)."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import NamedTuple

NO_PROGRAM = -1  # none runs
CAPTURED_PROGRAM = -2  # one that a CUDA Graph replays and that has no marks: it does not tell how far it is


class Doing(IntEnum):
    """What a rank does, in the order of one turn of the training loop."""

    STARTING = 0
    LOADING = 1  # and agreeing with all ranks on what to do next
    PUBLISHING = 2  # a checkpoint that was written behind training
    STEP = 3
    ENCODING = 4  # captions of the steps that come next
    REPORTING = 5
    VALIDATING = 6
    SAVING = 7
    SAMPLING = 8
    DECODING = 9
    ENDED = 10


class Standing(NamedTuple):
    """Where a rank stands.

    ``first``: of the turns that run this program, in which kernels may be compiled. ``record``: of ``program``, the one
    that is not finished, or where the program has marks that behind the last of them; all are, where it is past the
    last. ``before``: records of the programs that were run before.
    ``host_calls``: calls of all hosts that were begun and ended; it is in one where that is odd. Programs and host
    calls are the same on all ranks, so these counts tell who is behind.
    """

    step: int
    phase: Doing
    turn: int
    first: bool = False
    program: int = NO_PROGRAM
    record: int = 0
    before: int = 0
    host_calls: int = 0


_STEP, _PHASE, _TURN, _FIRST, _PROGRAM, _DONE, _BEFORE, _HOST_CALLS = range(8)
_WORDS = 8


class Marks:
    """Where a rank stands, in memory that forks share; and how long the longest turn of each phase was.

    ``record_done`` is called with the number of a record when it has been run, or a program with marks writes it into
    ``slot``, 8 bytes; ``host_calls`` is what :func:`comm.count_host_calls` takes.
    """

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * (_WORDS + len(Doing)))).cast("q")  # the longest turns are in ns
        self._words[_DONE], self._words[_PROGRAM] = -1, NO_PROGRAM
        self.slot = self._words[_DONE : _DONE + 1]
        self.record_done: Callable[[int], None] = partial(self._words.__setitem__, _DONE)
        self.host_calls = self._words[_HOST_CALLS:_WORDS]
        self._records = 0  # of the program that runs
        self._ran = {NO_PROGRAM, CAPTURED_PROGRAM}
        self._entered_ns = time.monotonic_ns()

    def at(self, step: int, phase: Doing) -> None:
        """A turn of ``phase`` begins, in ``step`` (from 0)."""
        now_ns, words = time.monotonic_ns(), self._words
        before = _WORDS + words[_PHASE]
        words[before] = max(words[before], now_ns - self._entered_ns)
        self._entered_ns = now_ns
        words[_STEP], words[_PHASE], words[_TURN], words[_FIRST] = step, phase, words[_TURN] + 1, False

    def goes_on(self) -> None:
        """Another piece of the turn begins, as long as any."""
        self._words[_TURN] += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, other ranks do work that no call of all hosts tells of: as one that they have not begun."""
        self._words[_HOST_CALLS] += 1
        try:
            yield
        finally:
            self._words[_HOST_CALLS] -= 1

    def run(self, program: int, records: int) -> None:
        """A program of so many records begins."""
        words = self._words
        words[_DONE], words[_BEFORE] = -1, words[_BEFORE] + self._records
        words[_PROGRAM], self._records = program, records
        words[_FIRST] |= program not in self._ran
        self._ran.add(program)

    @property
    def place(self) -> Standing:
        step, phase, turn, first, program, done, before, host_calls = self._words[:_WORDS]
        return Standing(step, Doing(phase), turn, bool(first), program, done + 1, before, host_calls)

    def longest_s(self, phase: Doing) -> float:
        """The longest turn of a phase that has ended; 0 where none has."""
        return self._words[_WORDS + phase] / 1e9
