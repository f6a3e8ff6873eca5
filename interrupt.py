"""Ctrl-C: one line and the shell's exit code, wherever it strikes (torch-free)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code, by the shell's convention


class Interrupted(BaseException):
    """Ctrl-C. Not an Exception: what mends errors lets it pass, what cleans up cleans up."""


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handler of SIGINT: what is being cleaned up is not interrupted again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Interrupted


@contextmanager
def interrupted_in_a_line() -> Iterator[None]:
    """Inside, a Ctrl-C ends the process with one line and exit code 130; where it is ignored (nohup), it still is."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Interrupted:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to all: who started them ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
