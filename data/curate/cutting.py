"""From the numbers of a scan to clips: shots, cut into pieces of one to another length; no frame is read for it.

Every frame of a video belongs to one row: to a clip, or to a rest that no clip took, so that hours add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from ...ranges import check_ranges, reals
from .camera import FLOW_COLUMNS, camera_of
from .rows import ClipRow, titled

STILL = 0.2  # change of brightness, of 255, below which a frame repeats the one before: what H.264 makes of a copy
SAME_S = 1e-6  # by which sums of frame times differ

ClipSeconds = Annotated[float, reals(0.01, 1e5, "no shot is shorter or longer", "s")]
CutScore = Annotated[float, reals(0.1, 100, "scdet gives 0 to 100", "of 100")]

CLIP_COLUMNS = (
    titled("first_frame", pa.int32(), "of the clip in its file, from 0"),
    titled("last_frame", pa.int32(), "of the clip in its file, included"),
    titled("first_s", pa.float64(), "when the first frame begins, s since the file's first"),
    titled("last_s", pa.float64(), "when the last frame ends, s since the file's first"),
    titled("shot", pa.int32(), "of its video, from 0"),
    titled("part", pa.string(), "clip; start: cut off where the video begins; spare: its shot gave another clip; rest"),
    titled("shots_per_s", pa.float32(), "of the whole video"),
    titled("motion_mean", pa.float32(), "vmafmotion, the mean over the clip"),
    titled("vector_mean", pa.float32(), "length of motion vectors, pixels a frame"),
    titled("blur_mean", pa.float32(), "width of edges, pixels"),
    titled("luma_mean", pa.float32(), "brightness, 0 to 255"),
    titled("still_share", pa.float32(), "of the frames, that repeat the one before"),
    *FLOW_COLUMNS,
)


@dataclass(frozen=True)
class Cutting:
    """How shots become clips.

    ``change``: scdet's score from which a frame begins a shot. ``start_s``: cut off where a clip begins its video.
    ``one``: a shot gives one clip, from its middle. Of a longer shot, pieces of ``most_s`` and what is left.
    """

    least_s: ClipSeconds = 4.0
    most_s: ClipSeconds = 16.0
    start_s: ClipSeconds | None = None
    change: CutScore = 10.0
    one: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "cut.")

    def clips(self, video: ClipRow) -> list[ClipRow]:
        """The rows of a scanned video, in its order."""
        begins = np.array(video["begins"])
        firsts = self._firsts(video)
        made: list[ClipRow] = []
        for shot, (first, end) in enumerate(pairwise([*firsts, len(begins) - 1])):
            for part, a, b in self._pieces(begins, first, end):
                made.append(_clip(video, begins, a, b, shot=shot, part=part, per_s=len(firsts) / begins[-1]))
        return made

    def _firsts(self, video: ClipRow) -> list[int]:
        """First frames of the shots."""
        if video["cuts"] is not None:
            return [0, *video["cuts"]]
        return [0, *(int(i) for i in np.flatnonzero(np.array(video["change"]) >= self.change) if i)]

    def _pieces(self, begins: Any, first: int, end: int) -> Iterator[tuple[str, int, int]]:
        """``(part, first frame, frame behind the last)`` of one shot, in order and without a gap."""
        if not first and self.start_s is not None:
            kept = min(int(np.searchsorted(begins, self.start_s - SAME_S)), end)
            if kept:
                yield "start", 0, kept
            first = kept
        if first == end:
            return
        seconds = begins[end] - begins[first]
        if self.one and seconds > self.most_s:
            a = int(np.searchsorted(begins, begins[first] + (seconds - self.most_s) / 2 - SAME_S))
            b = self._until(begins, a, end)
            spare = [("spare", first, a), ("clip", a, b), ("spare", b, end)]
            yield from (piece for piece in spare if piece[1] < piece[2])
            return
        while first < end:
            behind = self._until(begins, first, end)
            yield ("clip" if begins[behind] - begins[first] >= self.least_s - SAME_S else "rest"), first, behind
            first = behind

    def _until(self, begins: Any, first: int, end: int) -> int:
        """The frame behind the last one of a piece of ``most_s`` at most, one frame at least."""
        last = int(np.searchsorted(begins, begins[first] + self.most_s + SAME_S, side="right")) - 1
        return min(max(last, first + 1), end)


def _clip(video: ClipRow, begins: Any, first: int, end: int, *, shot: int, part: str, per_s: float) -> ClipRow:
    def over(name: str) -> Sequence[float]:
        """Of its frames that have one before them in the clip: the first one differs from another shot."""
        inside = slice(first + 1, end) if end - first > 1 else slice(first, end)
        return np.array(video[name][inside], dtype=np.float64)  # type: ignore[return-value]  # null is nan

    moved = [over(name) for name in ("vector", "right", "down", "grew", "fit")]
    return {
        "id": f"{video['id']}:{first}-{end - 1}",
        "first_frame": first,
        "last_frame": end - 1,
        "first_s": float(begins[first]),
        "last_s": float(begins[end]),
        "seconds": float(begins[end] - begins[first]),
        "shot": shot,
        "part": part,
        "shots_per_s": float(per_s),
        "motion_mean": _mean(over("motion")),
        "vector_mean": _mean(moved[0]),
        "blur_mean": _mean(over("blur")),
        "luma_mean": _mean(over("luma")),
        "still_share": float(np.mean(np.array(over("difference")) < STILL)),
        **camera_of(*moved),
    }


def _mean(values: Any) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) and math.isfinite(known.sum()) else None
