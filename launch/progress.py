"""Progress of long work, on standard error: a bar on a terminal, else a line now and then (torch-free)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

EVERY_S = 10.0  # between two lines, where there is no terminal

Begin = Callable[[str], None]  # the next piece of work begins, and is called so
T = TypeVar("T")


@contextmanager
def progress(title: str, pieces: int, *, silent: bool = False) -> Iterator[Begin]:
    """Yields what is to be called when each of ``pieces`` begins. Nothing is left on a terminal when all are done."""
    begun = 0
    if silent:
        yield lambda what: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn(f"{title}: {{task.description:<32}}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            bar = shown.add_task("", total=pieces)

            def begin(what: str) -> None:
                nonlocal begun
                shown.update(bar, completed=begun, description=what)
                begun += 1

            yield begin
        return
    said_s = -EVERY_S

    def say(what: str) -> None:
        nonlocal begun, said_s
        begun += 1
        if time.monotonic() - said_s >= EVERY_S:
            said_s = time.monotonic()
            print(f"{title}: {what} ({begun} of {pieces})", file=sys.stderr, flush=True)

    yield say


@contextmanager
def counted(title: str, *, silent: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what is to be told of work in rounds: the round's name, how many pieces are done, of how many."""
    console = Console(stderr=True)
    if silent:
        yield lambda what, done, pieces: None
    elif console.is_terminal:
        columns = (TextColumn(f"{title}: {{task.description:<32}}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            bar = shown.add_task("", total=None)
            yield lambda what, done, pieces: shown.update(bar, completed=done, total=pieces, description=what)
    else:
        said_s = -EVERY_S

        def say(what: str, done: int, pieces: int) -> None:
            nonlocal said_s
            if time.monotonic() - said_s >= EVERY_S:
                said_s = time.monotonic()
                print(f"{title}: {what} ({done} of {pieces})", file=sys.stderr, flush=True)

        yield say


def each(items: Iterable[T], begin: Begin, name: Callable[[T], str]) -> Iterator[T]:
    """The items, each begun under its name."""
    for item in items:
        begin(name(item))
        yield item
