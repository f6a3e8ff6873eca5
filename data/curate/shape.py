"""Size, shape and length of what is taken, and how many of it stand upright."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ...ranges import SEED_RANGE, check_ranges, integers, reals
from .concepts import thinned
from .cutting import ClipSeconds
from .rows import ClipRow

SidePx = Annotated[int, integers(1, 2**16, "no picture is larger", "pixels")]
SidesRatio = Annotated[float, reals(1, 100, "of the longer side to the shorter")]
LandscapeShare = Annotated[float, reals(0.01, 0.99, "a share of the clips; the rest are portrait")]


@dataclass(frozen=True)
class Lasting:
    """Of a video, by its header."""

    least_s: ClipSeconds = 4.0
    most_s: ClipSeconds = 120.0

    needs: ClassVar[str] = "probe"

    def __post_init__(self) -> None:
        check_ranges(self, "duration.")

    def dropped(self, row: ClipRow) -> str | None:
        told_s = row["told_s"]
        if told_s is None or self.least_s <= told_s <= self.most_s:
            return None
        return f"its video lasts {told_s:.1f} s"


@dataclass(frozen=True)
class LeastSize:
    """Width and height."""

    least_px: SidePx = 768

    needs: ClassVar[str] = "probe"

    def __post_init__(self) -> None:
        check_ranges(self, "size.")

    def dropped(self, row: ClipRow) -> str | None:
        return None if min(row["width"], row["height"]) >= self.least_px else f"{row['width']}x{row['height']} pixels"


@dataclass(frozen=True)
class Aspect:
    """``landscape_only``: width at least height, as the paper's Table 38 has it. ``most``: of the sides' ratio."""

    landscape_only: bool = False
    most: SidesRatio | None = None

    needs: ClassVar[str] = "probe"

    def __post_init__(self) -> None:
        check_ranges(self, "aspect.")

    def dropped(self, row: ClipRow) -> str | None:
        width, height = row["width"], row["height"]
        if self.landscape_only and width < height:
            return f"it stands upright: {width}x{height}"
        ratio = max(width, height) / min(width, height)
        return f"one side is {ratio:.2f} times the other" if self.most is not None and ratio > self.most else None


@dataclass(frozen=True)
class Balance:
    """``landscape`` of the clips lie, the others stand, as the paper's prose has it: what is too many goes, drawn."""

    landscape: LandscapeShare = 0.8
    seed: Annotated[int, SEED_RANGE] = 0

    needs: ClassVar[str] = "probe"

    def __post_init__(self) -> None:
        check_ranges(self, "balance.")

    def dropped(self, rows: Sequence[ClipRow]) -> dict[str, str]:
        """By id. Where one of both is absent, nothing can be balanced, and all stay."""
        lying = [row for row in rows if row["width"] >= row["height"]]
        standing = [row for row in rows if row["width"] < row["height"]]
        if not lying or not standing:
            return {}
        odds = self.landscape / (1 - self.landscape)
        most_lying, most_standing = math.ceil(len(standing) * odds), math.ceil(len(lying) / odds)
        return thinned(lying, most_lying, self.seed, "it lies") | thinned(
            standing, most_standing, self.seed, "it stands upright"
        )
