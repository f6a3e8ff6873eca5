"""Watches the job itself: ranks that fail speak with one voice, and a step that does not end ends the process."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch

from .comm import first_of
from .mesh import Mesh

STALL_S = 1800.0  # as the groups' own time-out, which does not see a replay


def vote(failure: str | None, mesh: Mesh | None) -> str | None:
    """The first rank's failure, on every rank; None when none failed. Either all replay or none does."""
    mine = None if failure is None else f"rank {mesh.rank if mesh else 0}: {failure}"
    return first_of(mine) if mesh else mine


class Heartbeat:
    """Ends the process when a step does not finish: no watchdog looks at collectives that a graph replays.

    ``expect`` arms it with a question (is the step done?), asked from a thread of its own every ``period_s``. On CUDA
    that thread takes ``device`` first: a thread begins on GPU 0, and what asks CUDA there makes a context on it, some
    half GB of another rank's memory.
    """

    def __init__(
        self,
        stall_s: float = STALL_S,
        on_stall: Callable[[str], None] | None = None,
        period_s: float = 1.0,
        device: str = "cpu",
    ) -> None:
        self._stall_s, self._period_s = stall_s, period_s
        self._on_stall = on_stall or _abort
        gpu = torch.device(device)  # without an index: this thread's, not that of the one which watches
        on_cuda = gpu.type == "cuda"
        self._device = (torch.cuda.current_device() if gpu.index is None else gpu.index) if on_cuda else None
        self._waiting: tuple[int, float, Callable[[], bool]] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def expect(self, step: int, done: Callable[[], bool]) -> None:
        """``step`` has been launched; ``done`` answers without waiting."""
        self._waiting = (step, time.monotonic(), done)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while not self._over.wait(self._period_s):
            waiting = self._waiting
            if waiting is None:
                continue
            step, since, done = waiting
            if done():
                if self._waiting is waiting:
                    self._waiting = None
            elif time.monotonic() - since > self._stall_s:
                self._waiting = None
                self._on_stall(
                    f"rank {os.environ.get('RANK', '0')}: the replay of step {step} has not finished for "
                    f"{self._stall_s:.0f} s; another rank has stopped, or its graph differs"
                )


def _abort(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os.kill(os.getpid(), signal.SIGABRT)
