"""How much moves: enough and not too much, no freeze, no slide show, no jitter. All from the numbers of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from ...ranges import check_ranges, integers, reals
from .cutting import STILL
from .rows import ClipRow

StillShare = Annotated[float, reals(0.01, 1, "a share of the frames")]
Vmaf = Annotated[float, reals(0.01, 100, "vmafmotion of what moves is 0.5 to 20")]
VectorPx = Annotated[float, reals(0.001, 1000, "motion vectors are in pixels a frame")]
PerSecond = Annotated[float, reals(0.01, 100, "shots a second")]
Pages = Annotated[int, integers(1, 10**4, "one picture alone is a freeze", "changes")]


@dataclass(frozen=True)
class Slides:
    """A video is a slide show where ``still`` of its frames repeat the one before, and it changes ``changes`` times."""

    still: StillShare = 0.8
    changes: Pages = 1

    needs: ClassVar[str] = "scan"

    def __post_init__(self) -> None:
        check_ranges(self, "slides.")

    def dropped(self, row: ClipRow) -> str | None:
        if row["still_video"] < self.still or row["changes_video"] < self.changes:
            return None
        return f"a slide show: {row['still_video']:.0%} of its video's frames repeat the one before"


@dataclass(frozen=True)
class Static:
    """At most ``most`` of a clip's frames repeat the one before."""

    most: StillShare = 0.5

    needs: ClassVar[str] = "scan"

    def __post_init__(self) -> None:
        check_ranges(self, "static.")

    def dropped(self, row: ClipRow) -> str | None:
        share = row["still_share"]
        return None if share <= self.most else f"{share:.0%} of its frames repeat the one before"


@dataclass(frozen=True)
class Motion:
    """VMAF's motion above ``vmaf``; motion vectors between ``least_px`` and ``most_px`` (Movie Gen, Table 38)."""

    vmaf: Vmaf = 2.0
    least_px: VectorPx = 0.5
    most_px: VectorPx = 7.0

    needs: ClassVar[str] = "scan"

    def __post_init__(self) -> None:
        check_ranges(self, "motion.")

    def dropped(self, row: ClipRow) -> str | None:
        motion, vectors = row["motion_mean"], row["vector_mean"]
        if motion is None or motion <= self.vmaf:
            return f"VMAF motion {motion or 0:.2f}"
        if vectors is None or not self.least_px < vectors < self.most_px:
            return f"motion vectors of {vectors or 0:.2f} pixels a frame"
        return None


@dataclass(frozen=True)
class Jitter:
    """Shots a second of the whole video stay below ``below``: more are cuts that a shaking camera pretends."""

    below: PerSecond = 0.85

    needs: ClassVar[str] = "scan"

    def __post_init__(self) -> None:
        check_ranges(self, "jitter.")

    def dropped(self, row: ClipRow) -> str | None:
        rate = row["shots_per_s"]
        return None if rate < self.below else f"its video has {rate:.2f} shots/s"


def stillness(video: ClipRow, change: float) -> ClipRow:
    """Of a scanned video: share of frames that repeat the one before, and how often the picture changes at once."""
    differences: Sequence[float] = video["difference"][1:]
    return {
        "still_video": float(np.mean(np.array(differences) < STILL)) if differences else 1.0,
        "changes_video": int((np.array(video["change"][1:]) >= change).sum()),
    }
