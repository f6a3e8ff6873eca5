"""Blocks that later steps take, read while those before them are taken: all lanes come to their next block at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ...errors import CinemeshError
from .samples import Samples


class ReadAhead:
    """One thread: a disk is read while batches are put together. ``of(step)``: the samples of a step."""

    def __init__(self, of: Callable[[int], Iterable[Samples]], horizon: int, steps: int) -> None:
        """``horizon``: so many steps ahead, of ``steps``; a block lasts as many as it has samples."""
        self._of, self._horizon, self._steps = of, horizon, steps
        self._pool = ThreadPoolExecutor(1, "ahead")
        self._now, self._asked = -1, 0  # the step that is taken, and the first that was not asked for yet

    def take(self, step: int) -> None:
        """A step is taken now; the blocks of those after it are read."""
        if step < self._now:  # the run went back
            self._asked = step
        self._now = step
        end = min(step + self._horizon, self._steps)
        for ahead in range(max(step, self._asked), end):
            self._pool.submit(self._read, ahead)
        self._asked = max(self._asked, end)

    def close(self) -> None:
        """Read nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> None:
        if step > self._now:  # else others do, or have done and let it go
            with suppress(CinemeshError):  # who takes the step meets it, and tells
                for samples in self._of(step):
                    samples.read_ahead()
