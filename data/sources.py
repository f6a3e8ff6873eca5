"""Where the bytes of a clip are: a file, or a member of a tar that is read in place (torch-free)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

PIECE_BYTES = 2**20  # of a member, read at once


@dataclass(frozen=True)
class Tarred:
    """A member of a tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"


Source = Path | Tarred


def ending(source: Source) -> str:
    """Of its name, from the last dot on, in small letters."""
    return Path(source.name).suffix.lower()


def address(source: Source) -> str:
    """For FFmpeg. "file:" stands before a name that may look like an address; "subfile" is a part of a file."""
    if isinstance(source, Path):
        return f"file:{source}"
    return f"subfile,,start,{source.offset},end,{source.offset + source.size},,:file:{source.tar}"


FFMPEG_PROTOCOLS = "file,subfile"  # that FFmpeg may follow: a playlist must not lead elsewhere


def opened(source: Source) -> BinaryIO:
    """To read and seek in; of a member, all its bytes. Raises OSError."""
    if isinstance(source, Path):
        return source.open("rb")
    with source.tar.open("rb") as file:
        file.seek(source.offset)
        return BytesIO(file.read(source.size))


def stamp(source: Source) -> list[object]:
    """What changes when a file is written to: its size and time. Raises OSError."""
    if isinstance(source, Path):
        found = source.stat()
        return [found.st_size, found.st_mtime_ns]
    return [*stamp(source.tar), source.name, source.offset, source.size]


def bytes_digest(source: Source) -> str:
    """SHA-256 of its bytes, in hex. Raises OSError."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = hashlib.sha256()
    with source.tar.open("rb") as file:
        file.seek(source.offset)
        left = source.size
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            found.update(piece)
            left -= len(piece)
    return found.hexdigest()
