"""Sampled frames of clips, kept as JPEG: what every measure of pictures looks at; a video is read once more for them.

One from the middle of each of a clip's equal parts: a part lasts a second at most, and there are eight at least. Of an
image, the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pyarrow as pa
from PIL import Image

from ...ranges import integers
from ..pixels import upright
from ..stills import read_still
from ..video import BadClip, Decoded
from .pictures import STILL_QUALITY, encode, shrunk, square
from .probe import PROBLEM
from .rows import ClipRow, titled

Count = Annotated[int, integers(1, 256, "borders and copies need some, and each takes 100 KB", "frames")]
SamplePx = Annotated[int, integers(64, 4096, "letters are lost in smaller ones", "pixels")]


@dataclass(frozen=True)
class SampleFrames:
    """Of every clip. ``px``: their short side, where the video has more."""

    least: Count = 8
    px: SamplePx = 512

    name: ClassVar[str] = "samples"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[int] = 16
    columns: ClassVar[tuple[pa.Field, ...]] = (
        PROBLEM,
        titled("samples", pa.list_(pa.binary()), "JPEG of frames, evenly over the clip"),
    )

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        found: dict[str, ClipRow] = {}
        for file in dict.fromkeys(row["file"] for row in rows):
            here = [row for row in rows if row["file"] == file]
            try:
                found |= self._image(here) if here[0]["kind"] == "image" else self._video(Path(file), here)
            except BadClip as bad:
                found |= {row["id"]: {"id": row["id"], "problem": bad.reason} for row in here}
        return [found[row["id"]] for row in rows]

    def _image(self, rows: Sequence[ClipRow]) -> dict[str, ClipRow]:
        kept = [self._kept(read_still(Path(rows[0]["file"])))]
        return {row["id"]: {"id": row["id"], "samples": kept} for row in rows}

    def _video(self, path: Path, rows: Sequence[ClipRow]) -> dict[str, ClipRow]:
        wanted = {row["id"]: self._places(row) for row in rows}
        kept: dict[int, bytes] = {}
        last = max(max(places) for places in wanted.values())
        needed = {place for places in wanted.values() for place in places}
        decoded = Decoded(path, interlaced=any(row["interlaced"] for row in rows))
        for index, frame in enumerate(decoded):
            if index in needed:
                pixels, on_its_side = upright(frame)
                aspect = 1 / decoded.pixel_aspect if on_its_side else decoded.pixel_aspect
                kept[index] = self._kept(square(Image.fromarray(pixels), aspect))
            if index == last:
                break
        if last not in kept:
            raise BadClip(path, "it has fewer frames than when it was scanned")
        return {each: {"id": each, "samples": [kept[place] for place in places]} for each, places in wanted.items()}

    def _places(self, row: ClipRow) -> list[int]:
        """Frame numbers in the file, rising."""
        frames = row["last_frame"] - row["first_frame"] + 1
        parts = min(frames, max(self.least, math.ceil(row["seconds"])))
        return [row["first_frame"] + int((part + 0.5) * frames / parts) for part in range(parts)]

    def _kept(self, image: Image.Image) -> bytes:
        return encode(shrunk(image, self.px), STILL_QUALITY)


def a_second_apart(samples: Sequence[bytes], seconds: float) -> Iterable[bytes]:
    """As many of them as the clip has seconds, one at least, evenly spread."""
    count = min(len(samples), max(1, math.ceil(seconds)))
    return (samples[int((part + 0.5) * len(samples) / count)] for part in range(count))
