"""Borders: bars around the picture that never change, above and below or left and right, and frames around it.

Rows and columns at the edges whose pixels are alike, over all sampled frames of a clip (FFmpeg's ``cropdetect`` looks
at darkness alone, and is not in PyAV's build).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa

from ...ranges import check_ranges, reals
from .pictures import decode
from .rows import ClipRow, titled

FLAT_LINE = (
    3.0  # standard deviation of brightness, of 255: bars stay below, after H.264 and JPEG; no line of a picture does
)
BorderShare = Annotated[float, reals(0.001, 1, "a share of the height or width")]


@dataclass(frozen=True)
class BorderMeasure:
    """Of every clip."""

    name: ClassVar[str] = "borders"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("samples",)
    unit: ClassVar[int] = 16
    columns: ClassVar[tuple[pa.Field, ...]] = (
        titled("border_share", pa.float32(), "of the height or the width, whichever bars take more of"),
    )

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        return [{"id": row["id"], "border_share": border_share(row["samples"])} for row in rows]


@dataclass(frozen=True)
class Borders:
    """At most so much of the height or width may be bars."""

    most: BorderShare = 0.015

    needs: ClassVar[str] = "borders"

    def __post_init__(self) -> None:
        check_ranges(self, "borders.")

    def dropped(self, row: ClipRow) -> str | None:
        share = row["border_share"]
        return None if share is None or share <= self.most else f"bars take {share:.1%} of the picture"


def border_share(samples: Sequence[bytes]) -> float:
    """Of the height or the width, the larger share; 1 for a picture that is all alike."""
    pictures = np.stack([np.asarray(decode(data).convert("L"), np.float64) for data in samples])
    return max(_edges(pictures), _edges(pictures.transpose(0, 2, 1)))


def _edges(pictures: Any) -> float:
    """Share of the lines [frames, line, along] at both ends that are flat, over all frames at once."""
    flat = pictures.std((0, 2)) < FLAT_LINE
    if flat.all():
        return 1.0
    return float(np.argmin(flat) + np.argmin(flat[::-1])) / len(flat)
