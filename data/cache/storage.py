"""RawBytes of a folder's files: of one that is mounted, or at a URL that fsspec reads."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ...errors import CinemeshError, in_a_line

OPEN_FILES = 256  # at once, of a mounted folder: a process has 1,024 by default
LOOK = "see whether the disk or the network is well; `cinemesh data check` reads every shard"


def is_url(place: str) -> bool:
    """Whether a place is one for fsspec: ``s3://bucket/cache``, ``memory://x``."""
    return "://" in place


class Storage:
    """Reads files by their name below ``root``, from any thread. Raises CinemeshError, which names file and offset."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") if is_url(root) else root
        self._open: OrderedDict[str, int] = OrderedDict()
        self._remote: Any = _filesystem(self.root) if is_url(root) else None
        self._lock = Lock()

    def place(self, name: str) -> str:
        """Where a file is, for a message."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return (
            self._told(name, lambda: self._remote.exists(self.place(name)))
            if self._remote
            else self.path(name).is_file()
        )

    def path(self, name: str) -> Path:
        """Of a file in a mounted folder."""
        assert self._remote is None
        return Path(self.root, name)

    def size(self, name: str) -> int:
        """RawBytes of a file."""
        return self._told(
            name, lambda: self._remote.size(self.place(name)) if self._remote else self.path(name).stat().st_size
        )

    def all(self, name: str) -> bytes:
        """A whole file."""
        return self._told(
            name, lambda: self._remote.cat_file(self.place(name)) if self._remote else self.path(name).read_bytes()
        )

    def opened(self, name: str) -> Any:
        """What pyarrow reads a file from: its path, or an open file."""
        if self._remote is None:
            return str(self.path(name))
        return self._told(name, lambda: self._remote.open(self.place(name), "rb"))

    def read(self, name: str, offset: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """``size`` bytes from ``offset`` on. Raises CinemeshError where the file has fewer."""
        found = self._told(name, lambda: self._read(name, offset, size), offset)
        if len(found) != size:
            raise CinemeshError(
                f"{self.place(name)} is cut short: {size:,} bytes at offset {offset:,} are wanted, and there are "
                f"{len(found):,}",
                remedy="restore the file; where the folder can be written, delete its folder and build again",
            )
        return found

    def _read(self, name: str, offset: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self._remote:
            found = self._remote.cat_file(self.place(name), start=offset, end=offset + size)
            return np.frombuffer(bytearray(found), np.uint8)
        with self._lock:  # a file that is read from here is not closed meanwhile
            file = self._open.pop(name, None)
            if file is None:
                file = os.open(self.path(name), os.O_RDONLY)
            self._open[name] = file
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            file = os.dup(file)
        try:
            data, filled = np.empty(size, np.uint8), 0
            while filled < size and (more := os.preadv(file, [data.data[filled:]], offset + filled)):
                filled += more
            return data[:filled]
        finally:
            os.close(file)

    def _told(self, name: str, work: Any, offset: int | None = None) -> Any:
        try:
            return work()
        except FileNotFoundError as error:
            raise CinemeshError(
                f"{self.place(name)} is missing", remedy="restore it, or build the cache again"
            ) from error
        except CinemeshError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            at = "" if offset is None else f" at offset {offset:,}"
            said = getattr(error, "strerror", None) or in_a_line(error)
            raise CinemeshError(f"{self.place(name)} cannot be read{at}: {said}", remedy=LOOK) from error

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


def _filesystem(url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise CinemeshError(
            f"{url} cannot be read: {in_a_line(error)}",
            remedy="install what fsspec needs for it (pip install s3fs, gcsfs), or mount it and name the folder",
        ) from error
