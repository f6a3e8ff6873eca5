"""A place is a path, or a URL of an object store: what checkpoints and leases do with files there (torch-free).

path    a file is written under another name, and linked or renamed when all of it is on the disk
URL     an object appears when all of it has been sent
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ...errors import CinemeshError
from ...files import check_output_folder
from .remote import RemotePath

Location = Path | RemotePath
AnyLocation = TypeVar("AnyLocation", bound=Location)

MOST_READ_BYTES = 64 * 2**20  # of a file that is read whole, a manifest or a lease: that of 6,144 ranks has 4 MB
NO_ROOM = "free some space or write to another file system"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")  # nobody means a folder called s3:
_LOCAL = "file://"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  # of a file system that has none


def location_of(given: str | Location) -> Location:
    """What a person names. Raises CinemeshError for a URL that nothing here reaches."""
    text = str(given)
    if text.startswith(_LOCAL):
        return Path(text.removeprefix(_LOCAL))
    if _ONE_SLASH.match(text):
        raise CinemeshError(f"{text} is no URL", remedy="write two slashes: s3://bucket/run")
    if isinstance(given, RemotePath) or not _URL.match(text):
        return given if isinstance(given, RemotePath) else Path(given)
    place = RemotePath(text.rstrip("/"))
    if not text.rstrip("/").partition("://")[2]:
        raise CinemeshError(f"{text}: it names no bucket", remedy="write for example s3://bucket/run")
    place.check()
    return place


def children(folder: Location) -> list[Location]:
    """All that lies in a folder; nothing where it is not there."""
    if isinstance(folder, RemotePath):
        return [*folder.children()]
    return [*sorted(folder.iterdir())] if folder.is_dir() else []


def size_of(file: Location) -> int | None:
    """Bytes; None where there is no such file."""
    if isinstance(file, RemotePath):
        return file.size()
    return file.stat().st_size if file.is_file() else None


def modified(file: Location) -> float | None:
    """Seconds, by the clock of where it lies; None where it is not there."""
    if isinstance(file, RemotePath):
        return file.modified()
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def read_file(file: Location, most_bytes: int = MOST_READ_BYTES) -> bytes:
    """All of it, or so many bytes. Raises OSError, and of a URL what :class:`RemotePath` raises."""
    if isinstance(file, RemotePath):
        return file.read(0, min(most_bytes, file.size() or 0))
    with file.open("rb") as opened:
        return opened.read(most_bytes)


def read_range(file: Location, start: int, stop: int) -> bytearray:
    """Bytes ``start`` to ``stop``; fewer where the file ends. Raises as :func:`read_file`."""
    if isinstance(file, RemotePath):
        return bytearray(file.read(start, stop))
    data = bytearray(stop - start)
    view, opened = memoryview(data), os.open(file, os.O_RDONLY)
    try:
        while view and (count := os.preadv(opened, [view], start)):
            view, start = view[count:], start + count
    finally:
        os.close(opened)
    return data


def write_file(file: Location, chunks: Iterable[memoryview]) -> None:
    """A file of these bytes, which is on the disk when this returns. Raises as :func:`read_file`."""
    if isinstance(file, RemotePath):
        file.write(chunks)
        return
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for chunk in chunks:
            while chunk:
                chunk = chunk[os.write(opened, chunk) :]
        os.fsync(opened)
    finally:
        os.close(opened)


def put_file(file: Location, data: bytes) -> None:
    """In place of what may be there: a reader sees the old or the new, whole. Raises as :func:`read_file`."""
    if isinstance(file, RemotePath):
        file.put(data)
        return
    with _beside(file, data) as part:
        os.replace(part, file)
    _sync(file.parent)


def create_file(file: Location, data: bytes) -> bool:
    """Whether the file is there now, whole, and by this call: not where there is one of its name.

    Of several at the same moment one does it: see :attr:`RemotePath.is_conditional`. Raises as :func:`read_file`.
    """
    if isinstance(file, RemotePath):
        return file.create(data)
    with _beside(file, data) as part:
        try:
            os.link(part, file)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                os.close(os.open(file, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            os.replace(part, file)
    _sync(file.parent)
    return True


def make_folder(folder: Location) -> None:
    """And those above it; an object store has none. Raises OSError."""
    if not isinstance(folder, RemotePath):
        folder.mkdir(parents=True, exist_ok=True)


def remove_folder(folder: Location) -> None:
    """With all that lies in it. Raises as :func:`read_file`."""
    if isinstance(folder, RemotePath):
        folder.remove_all()
    else:
        shutil.rmtree(folder)


def free_bytes(folder: Location) -> int | None:
    """That may still be written there; None where there is no such limit."""
    return None if isinstance(folder, RemotePath) else shutil.disk_usage(folder).free


def check_room(folder: Location, what: str, elements: int, each: int, remedy: str = NO_ROOM) -> None:
    """Raise CinemeshError when ``folder`` has no room for so many parameters of ``each`` bytes."""
    needed, free = elements * each, free_bytes(folder)
    if free is not None and free < needed:
        raise CinemeshError(
            f"{what} needs {needed:,} bytes ({elements:,} parameters * {each} bytes), but {folder} has {free:,} free",
            remedy=remedy,
        )


def check_holds(folder: Path, what: str, size_bytes: int) -> None:
    """Raise CinemeshError unless the file system of ``folder``, or of where it will be, could hold so many bytes."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    total = shutil.disk_usage(there).total
    if total < size_bytes:
        raise CinemeshError(
            f"{what} needs {size_bytes:,} bytes of {folder}, which has {total:,} in all",
            remedy="name a folder of a larger file system, or take less",
        )


def check_folder(folder: Location, what: str) -> None:
    """Raise CinemeshError unless files can be written into a folder, which is made as needed; leaves nothing behind.

    ``what`` names it to the user.
    """
    if not isinstance(folder, RemotePath):
        check_output_folder(folder, what)
        return
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        probe.put(b"")
        probe.unlink(missing_ok=True)
    except CinemeshError as error:
        raise CinemeshError(f"{what}: {error.problem}", remedy=error.remedy) from error


@contextmanager
def _beside(file: Path, data: bytes) -> Iterator[Path]:
    """A file of these bytes, on the disk, in the same folder: for as long as it has no other name."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        write_file(part, [memoryview(data)])
        yield part
    finally:
        part.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """A name survives a power failure."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
