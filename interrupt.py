"""Ctrl-C: one line and the shell's exit code, wherever it strikes; no rank outlives who started it (torch-free)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code, by the shell's convention
# What waits for children wakes so often: among ``deaf_children`` another thread may take a Ctrl-C, and ends no wait.
WAKE_S = 0.2


class Interrupted(BaseException):
    """Ctrl-C. Not an Exception: what mends errors lets it pass, what cleans up cleans up."""


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handler of SIGINT: what is being cleaned up is not interrupted again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Interrupted


@contextmanager
def interrupted_in_a_line(*, last: bool = False) -> Iterator[None]:
    """Inside, a Ctrl-C ends the process with exit code 130, and of the ranks of a machine the first says so in a line.

    Where it is ignored (nohup), it still is. ``last``: nothing follows but the interpreter's own end, in which a Ctrl-C
    is ignored; else it is again what it was before.
    """
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, interrupt):  # or one is inside of another
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Interrupted:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if last else before)


@contextmanager
def interrupt_later() -> Iterator[None]:
    """A Ctrl-C inside is obeyed at the end: what must not be done by half is done."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or no handler of Python's
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda signum, frame: heard.append((signum, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[0])


@contextmanager
def deaf_children(*, forked: bool = False) -> Iterator[None]:
    """Processes started inside hear no Ctrl-C, which a terminal sends to all: who started them ends them, and hears.

    They inherit a mask, through exec too, until each calls :func:`be_deaf`. ``forked``: none is started by exec.
    """
    from multiprocessing import resource_tracker

    with interrupt_later():
        if not forked:  # it would be started with the first of them, and takes the mask off
            resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def be_deaf() -> None:
    """In a process that was started among :func:`deaf_children`: it may have a handler of its own from here on.

    It is killed when who started it is gone: else a killed launcher leaves ranks that write on, beside a new start.
    """
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if (parent := parent_process()) is not None:
        Thread(target=_end_with, args=(parent.pid,), name="parent", daemon=True).start()


def _end_with(parent: int | None) -> None:
    while os.getppid() == parent:  # forked siblings hold the pipes by which one could wait for it
        time.sleep(WAKE_S)
    os.kill(os.getpid(), signal.SIGKILL)
