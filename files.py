"""Files that appear whole or not at all, and texts that may name one (torch-free)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .documents import quoted
from .errors import CinemeshError

MOST_NAME_BYTES = 200  # of a file's name: Linux takes 255, and ``atomic_file`` and a suffix need some


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; takes the final name when all went well, else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
