"""A file that grows by lines: each is on the disk before it is confirmed (torch-free).

Several threads, and several processes of one folder, may write at once: the file is locked for each line. A crash in
the middle of a line loses that line alone: the next one cuts the torn one off.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Generic, Protocol, TypeVar

from ..errors import CinemeshError


class Journal:
    """Of lines; raises CinemeshError where the file cannot be written."""

    def __init__(self, path: Path) -> None:
        self.lock = Lock()  # of threads; held while a line is written
        try:
            self._file = open(path, "a+b")  # noqa: SIM115  held until the server ends
        except OSError as error:
            raise CinemeshError(
                f"cannot write {path}: {error.strerror}", remedy="see to the folder's permissions"
            ) from error
        with self.lock, self._alone():
            self._mend()

    def close(self) -> None:
        self._file.close()

    def add(self, line: str) -> None:
        """Write ``line``, which ends in a newline, and wait for the disk. The caller holds the ``lock``."""
        with self._alone():
            self._mend()
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Against other servers of the folder."""
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


class Said(Protocol):
    """What a person says of one thing."""

    def line(self) -> str:
        """As the journal has it."""
        ...


T = TypeVar("T", bound=Said)


class LastAnswers(Generic[T]):
    """The last answer on each thing, by its name, and the journal of all of them."""

    def __init__(self, path: Path, read: Callable[[], Mapping[str, T]]) -> None:
        """``read`` gives those that the file holds, once it is mended. Raises CinemeshError as it and Journal do."""
        self._journal = Journal(path)
        try:
            self._given = dict(read())
        except CinemeshError:
            self._journal.close()
            raise

    def close(self) -> None:
        self._journal.close()

    def add(self, name: str, answer: T) -> None:
        """Write it, and wait for the disk."""
        with self._journal.lock:
            self._journal.add(answer.line())
            self._given[name] = answer

    def given(self) -> dict[str, T]:
        with self._journal.lock:
            return dict(self._given)
