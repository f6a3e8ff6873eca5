"""Tar files whose members are found by their offset: written as webdataset reads them (torch-free).

Members are called KEY.EXTENSION, as ``000000012.safetensors``: the files of one sample have one key, without a dot.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import CinemeshError, in_a_line

TENSORS = "safetensors"  # extension of the members that are written here
BLOCK_BYTES = 512  # of tar: a header, and what members are padded to


@dataclass(frozen=True)
class TarMember:
    """A file of a tar, by where its bytes are."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """Of its sample: the name to the first dot of its last part, as webdataset and Energon have it."""
        folder, slash, last = self.name.rpartition("/")
        return folder + slash + last.partition(".")[0]

    @property
    def extension(self) -> str:
        """What follows the key, in small letters, without its dot."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarWriter:
    """Writes a tar whose bytes depend on what is added alone."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.count = 0

    def add(self, data: bytes) -> tuple[int, int]:
        """A sample's tensors; the offset and the crc32 of its bytes."""
        info = tarfile.TarInfo(f"{self.count:09d}.{TENSORS}")
        info.size = len(data)
        offset = self._tar.offset + BLOCK_BYTES
        self._tar.addfile(info, io.BytesIO(data))
        self.count += 1
        return offset, zlib.crc32(data)

    def close(self) -> None:
        self._tar.close()
        self._file.close()


def members(path: Path) -> Iterator[TarMember]:
    """The files of a tar, in order. Raises CinemeshError, with the offset, where it is damaged or cut short."""
    at = 0
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                at = info.offset
                if info.isfile():
                    if info.offset_data + info.size > size:
                        raise tarfile.ReadError(f"{info.name} is cut short")
                    yield TarMember(info.name, info.offset_data, info.size)
            at = tar.offset
            if at > size:
                raise tarfile.ReadError("it is cut short")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise CinemeshError(
            f"{path} is damaged at offset {at:,}: {in_a_line(error)}", remedy="restore it, or leave it out"
        ) from error
