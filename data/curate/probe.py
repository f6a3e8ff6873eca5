"""First look at a file: its digest, its size and shape as people see it, its length by its header; one frame decoded.

A file that cannot be read, or not be shown as it is meant, has a ``problem`` in place of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
from PIL import Image

from ...files import file_digest
from ..pixels import unshowable, upright
from ..stills import is_still, read_still
from ..video import BadClip, Decoded
from .pictures import encode, square, thumb
from .rows import ClipRow, titled

PROBLEM = titled("problem", pa.string(), "why the file is not read; null: it is")


@dataclass(frozen=True)
class Probe:
    """Of every file."""

    name: ClassVar[str] = "probe"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[int] = 64
    columns: ClassVar[tuple[pa.Field, ...]] = (
        titled("digest", pa.string(), "SHA-256 of the file"),
        PROBLEM,
        titled("width", pa.int32(), "pixels, upright, of square pixels"),
        titled("height", pa.int32(), "pixels, upright, of square pixels"),
        titled("told_s", pa.float64(), "length by the header, in s; null where it tells none, 0 of an image"),
        titled("thumb", pa.binary(), "JPEG of the first frame"),
    )

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        return [{"id": row["id"], **_probed(Path(row["file"]))} for row in rows]


def _probed(path: Path) -> ClipRow:
    try:
        digest = file_digest(path)
    except OSError as error:
        return {"problem": f"it cannot be opened ({error.strerror or type(error).__name__})"}
    try:
        picture, told_s = (read_still(path), 0.0) if is_still(path) else _first_frame(path)
    except BadClip as bad:
        return {"digest": digest, "problem": bad.reason}
    width, height = picture.size
    return {
        "digest": digest,
        "width": width,
        "height": height,
        "told_s": told_s,
        "thumb": encode(thumb(picture)),
    }


def _first_frame(path: Path) -> tuple[Image.Image, float | None]:
    decoded = Decoded(path)
    for frame in decoded:
        if reason := unshowable(frame):
            raise BadClip(path, reason)
        pixels, on_its_side = upright(frame)
        told_s = None if decoded.told is None else float(decoded.told)
        return square(
            Image.fromarray(pixels), 1 / decoded.pixel_aspect if on_its_side else decoded.pixel_aspect
        ), told_s
    raise BadClip(path, "it holds no frame")
