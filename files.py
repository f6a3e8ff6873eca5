"""Files that appear whole or not at all, the check that they can, and texts that may name one (torch-free)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .documents import quoted
from .errors import CinemeshError

MOST_NAME_BYTES = 200  # of a file's name: Linux takes 255, and ``atomic_file`` and a suffix need some
ELSEWHERE = "name another place, or see to its permissions"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; takes the final name when all went well, else is removed.

    Raises CinemeshError when it cannot be written, which :func:`check_output_file` tells before the work as far as it
    can be told.
    """
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.chmod(0o666 & ~_umask())  # some writers, safetensors among them, give it to its owner alone
        os.replace(part, path)
    except OSError as error:
        raise CinemeshError(
            f"cannot write {path}: {error.strerror or error}", remedy="see to its folder and the free space there"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(name: object, what: str) -> str:
    """``name``, a text of ``what`` (``"scene 3 of captions.yaml: name"``), where it names a file of one folder.

    Raises CinemeshError for what could lead out of that folder, hide there, or be no file's name.
    """
    if (
        not isinstance(name, str)
        or name.startswith(".")
        or not 0 < len(name.encode(errors="replace")) <= MOST_NAME_BYTES
        or any(sign in "/\\" or not sign.isprintable() for sign in name)
    ):
        raise CinemeshError(
            f"{what} is {quoted(name)}, and files are called after it",
            remedy=f"use 1 to {MOST_NAME_BYTES} bytes without slashes and control characters, no dot first",
        )
    return name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def check_output_file(path: Path, what: str) -> None:
    """Raise CinemeshError unless a file can be written at ``path``, in folders that are made as needed.

    ``what`` names it to the user: ``--out``. Leaves nothing behind.
    """
    with _told(path, what):
        if path.is_dir():
            raise CinemeshError(f"{what} {path} is a directory", remedy="name a file")
        if path.exists() and not path.is_file():
            raise CinemeshError(f"{what} {path} exists and is no regular file", remedy="name another")
        _part(path).exists()  # raises for a name that is too long
        _check_folder(path.parent, path, what)


def check_output_folder(path: Path, what: str) -> None:
    """Raise CinemeshError unless files can be written into the folder ``path``, which is made as needed.

    ``what`` names it to the user: ``logging.directory``. Leaves nothing behind.
    """
    with _told(path, what):
        _check_folder(path, path, what)


def _check_folder(folder: Path, path: Path, what: str) -> None:
    folder = folder.absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise CinemeshError(f"{what} {path}: {there} is a file, where a folder is wanted", remedy="name another place")
    with tempfile.TemporaryFile(dir=there):
        pass


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    if "\0" in str(path):
        raise CinemeshError(f"{what} {str(path)!r} cannot be written: no name holds a null", remedy=ELSEWHERE)
    try:
        yield
    except OSError as error:
        raise CinemeshError(f"{what} {path} cannot be written: {error.strerror}", remedy=ELSEWHERE) from error
