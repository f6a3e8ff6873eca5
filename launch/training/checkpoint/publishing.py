"""A checkpoint's folder as it is begun, published and removed: at no moment is a part of one taken for a whole.

    begin      a mark, then the files
    publish    the manifest, which appears whole and where there is none; then the mark goes
    remove     the mark comes back, then the manifest goes, then all else

A folder with a manifest is a checkpoint. One without, and with the mark or with nothing in it, is what somebody was
killed over: it is no checkpoint, and the next save removes it. Any other is damaged: its manifest may be brought back.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ....errors import CinemeshError, in_a_line
from ...storage.places import NO_ROOM, Location, check_room, children, create_file, make_folder, put_file, remove_folder
from .manifest import MANIFEST, Manifest, step_of

UNFINISHED = ".unfinished"  # the mark


def begin_folder(folder: Location) -> None:
    """Make the folder of a checkpoint that is to be written. Raises OSError, and CinemeshError of an object store."""
    make_folder(folder)
    put_file(folder / UNFINISHED, b"")


def publish(manifest: Manifest, folder: Location) -> None:
    """Write the manifest of the files in ``folder``. Raises as :func:`begin_folder`, and where there is one."""
    if not create_file(folder / MANIFEST, manifest.text().encode()):
        raise CinemeshError(
            f"cannot write checkpoint {folder}: it has got a {MANIFEST} meanwhile",
            remedy="another run writes there: give each a logging.directory of its own",
        )
    (folder / UNFINISHED).unlink(missing_ok=True)


def remove(folder: Location) -> None:
    """Raises as :func:`begin_folder`."""
    if not (folder / UNFINISHED).exists():
        put_file(folder / UNFINISHED, b"")
    (folder / MANIFEST).unlink(missing_ok=True)
    for child in children(folder):
        if child.name != UNFINISHED:
            child.unlink(missing_ok=True)
    remove_folder(folder)


def is_unfinished(folder: Location) -> bool:
    """Whether somebody was killed over it."""
    names = {child.name for child in children(folder)}
    if MANIFEST in names or UNFINISHED in names:
        return MANIFEST not in names
    return folder.exists() and all(name.startswith(f".{UNFINISHED}") for name in names)  # a mark that is being written


def clear(directory: Location) -> None:
    """Remove what saves that were broken off have left in ``directory``. Raises as :func:`begin_folder`."""
    for folder in children(directory):
        if step_of(folder) is not None and is_unfinished(folder):
            remove(folder)


def make_room(directory: Location, folder: Location, elements: int, each: int) -> None:
    """Begin the checkpoint ``folder`` of a run, of so many parameters of ``each`` bytes, where another may be.

    What broken saves have left goes first. Raises as :func:`begin_folder`, and when there is no room.
    """
    make_folder(directory)
    clear(directory)
    check_room(directory, "a checkpoint", elements, each)
    if folder.exists():  # the same step again, after resuming from an earlier one
        remove(folder)
    begin_folder(folder)


@contextmanager
def published_or_gone(folder: Location) -> Iterator[None]:
    """Begin a new checkpoint; where the block raises, nothing is left of it. Raises CinemeshError."""
    try:
        if is_unfinished(folder):
            remove(folder)
        if folder.exists():
            raise CinemeshError(f"{folder} exists", remedy="name a new folder, or move that one away")
        begin_folder(folder)
        try:
            yield
        except BaseException:
            with suppress(OSError, CinemeshError):
                remove(folder)
            raise
    except OSError as error:
        raise write_failed(folder, error) from error


def write_failed(path: Location, cause: OSError, where: str = "") -> CinemeshError:
    """One message, with the remedy for what the file system says."""
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = NO_ROOM
    elif cause.errno == errno.ENOENT:
        remedy = "somebody removed it meanwhile: give each run a logging.directory of its own"
    elif cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "look to the permissions of its folder"
    else:
        remedy = "look to its file system"
    return CinemeshError(f"cannot write checkpoint {path}: {where}{in_a_line(cause)}", remedy=remedy)
