"""A process of a rank for one job: forked, watched, and killed with all that it started.

The process that forks has loaded torch and has not touched CUDA, so what it forks may, at once. What a job leaves
behind (groups that hang, a context that an illegal access has broken, memory) ends with its process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ...errors import CinemeshError, in_a_line
from ..cluster.processes import BUG, SIGNALS

END_S = 10.0  # what a killed process gets to disappear
STACKS_S = 0.5  # before its time is over, when it writes where its threads stand
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG: linux/prctl.h
TOLD_BYTES = 3000  # of what a process printed, or of its stacks, that are sent on when it failed


class Child:
    """Runs ``work`` in a process of its own, for ``seconds`` at most.

    What it prints goes to the end of ``output``; how it ended lies in the folder ``files``.
    """

    def __init__(self, work: Callable[[], None], seconds: float, output: Path, files: Path) -> None:
        self._output, self._error, self._stacks = output, files / "error", files / "stacks"
        for file in (self._error, self._stacks):
            file.unlink(missing_ok=True)
        self._printed = output.stat().st_size if output.exists() else 0
        arguments = (work, seconds, output, self._error, self._stacks)
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        self._process.start()

    def code(self, wait_s: float) -> int | None:
        """Its exit code, minus the signal that killed it; None where it still runs after ``wait_s``."""
        self._process.join(wait_s)
        return self._process.exitcode

    def kill(self) -> bool:
        """Whether it is gone: what the kernel does not give up, as behind a GPU that hangs, is left behind."""
        if self._process.exitcode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid or 0, signal.SIGKILL)
            self._process.kill()  # before it had a group of its own
            self._process.join(END_S)
        return self._process.exitcode is not None

    def error(self) -> str:
        """What ended it, in a line; empty where nobody said."""
        return self._error.read_text(encoding="utf-8") if self._error.exists() else ""

    def stacks(self) -> str:
        """Where its threads stood shortly before its time was over."""
        return self._stacks.read_text(encoding="utf-8")[:TOLD_BYTES] if self._stacks.exists() else ""

    def tail(self) -> str:
        """The end of what it printed."""
        with self._output.open("rb") as file:
            file.seek(max(self._printed, self._output.stat().st_size - TOLD_BYTES))
            return file.read().decode(errors="replace")


def _run(work: Callable[[], None], seconds: float, output: Path, error: Path, stacks: Path) -> None:
    gc.freeze()  # what the parent left to collect is the parent's
    os.setsid()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    signal.alarm(int(seconds + END_S) + 1)  # elsewhere, when nobody is left to kill it
    with output.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    code = 0
    try:
        with stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback_later(max(0.05, seconds - STACKS_S), file=file)
            work()
    except BaseException as raised:  # noqa: BLE001  whatever ends a job is told, and ends that job alone
        traceback.print_exc()
        kind = "" if isinstance(raised, CinemeshError) else f"{type(raised).__name__}: "
        error.write_text(kind + in_a_line(raised, most=TOLD_BYTES), encoding="utf-8")
        code = BUG
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # groups that hang would keep the interpreter from its end
