"""Work that any number of processes share, on one machine or many, at once or one after the other (torch-free).

[Note: claims] A task is done when what it makes is there, and that appears whole or not at all. Who begins one holds a
lock on a file of its name meanwhile, which the kernel, or the file server, takes back when the process ends, however it
ends. The lock only saves work: two that do one task make the same, and the first to finish has made it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...errors import CinemeshError

CLAIMS = "claims"  # folder of the locks
POLL_S = 0.2  # in which it is seen whether others have finished
GOLDEN = 2654435761  # Knuth's multiplier: spreads process numbers over where they begin


@dataclass(frozen=True)
class Task:
    """``makes`` is there when it is done; ``do`` makes it. ``clips``: of them it is, for a bar."""

    name: str
    makes: Path
    do: Callable[[], None]
    clips: int = 1


class Onlooker(Protocol):
    """Who is told how far this process is: the watchdog of a rank, which must tell who works from who waits."""

    def goes_on(self) -> None:
        """Another task begins here."""
        ...

    def waiting(self) -> AbstractContextManager[object]:
        """Inside, others do what is left."""
        ...


class Nobody:
    """No onlooker."""

    def goes_on(self) -> None:
        """Nobody hears it."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Nobody hears it."""
        yield


def share_out(root: Path, tasks: Sequence[Task], done: Callable[[int], object], onlooker: Onlooker) -> None:
    """Do what nobody else does, until all is done by someone; ``done`` hears of how many clips, whoever did them.

    Waits as long as others work. Raises CinemeshError as a task does: what was done stays.
    """
    begin = os.getpid() * GOLDEN % max(len(tasks), 1)
    left = [*tasks[begin:], *tasks[:begin]] if len(tasks) > 1 else list(tasks)
    while left:
        waiting: list[Task] = []
        worked = False
        for task in left:
            if not task.makes.exists():
                with claimed(root, task.name) as mine:
                    if not mine:
                        waiting.append(task)
                        continue
                    if not task.makes.exists():
                        worked = True
                        onlooker.goes_on()
                        task.do()
            done(task.clips)
        left = waiting
        if left and not worked:
            with onlooker.waiting():
                time.sleep(POLL_S)


@contextmanager
def claimed(root: Path, name: str) -> Iterator[bool]:
    """Whether this process holds the claim of that name inside: see [Note: claims]."""
    path = root / CLAIMS / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise CinemeshError(
            f"cannot write {path}: {error.strerror}", remedy="see to its folder and the free space there"
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        except OSError:  # a file system without locks: everybody does everything, and one comes first
            mine = True
        yield mine
        if mine:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when all went well and nobody had it before; else it is removed.

    Raises CinemeshError when it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
    try:
        for left in path.parent.glob(f".{path.name}.*.part"):  # of who was killed: the claim is ours
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        try:
            os.replace(part, path)
        except OSError:
            if not path.is_dir():  # else another was first
                raise
    except OSError as error:
        raise CinemeshError(
            f"cannot write {path}: {error.strerror or error}", remedy="see to its folder and the free space there"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
