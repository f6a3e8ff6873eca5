"""One pass over a video: numbers of every frame, at one size, from which shots, motion and stillness are decided.

PyAV's own filters: ``scdet`` (difference of two frames, less what the frames before differed), ``vmafmotion``,
``blurdetect``, ``signalstats``; and the vectors of a re-encode. Of the numbers every threshold can be decided anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, ClassVar

import av
import av.filter
import numpy as np
import pyarrow as pa
from av.video.format import VideoFormat

from ...ranges import integers
from ..pixels import turned
from ..video import BadClip, look_through
from .detectors import Detector, detector
from .pictures import encode, thumb
from .probe import PROBLEM
from .rows import SERIES, ClipRow, titled
from .vectors import Flow, Normaliser

LEAST_SIDE_PX = 32  # of a scanned picture: filters look at blocks of it
THUMB_EVERY_S = 1.0
FILTERS = (("scdet", "t=0:sc_pass=0"), ("vmafmotion", ""), ("blurdetect", ""), ("signalstats", ""))
NUMBERS = {  # of a frame: what the filters call them
    "change": "lavfi.scd.score",
    "motion": "lavfi.vmafmotion.score",
    "blur": "lavfi.blur",
    "luma": "lavfi.signalstats.YAVG",
    "difference": "lavfi.signalstats.YDIF",
}
FLOWS = ("vector", "right", "down", "grew", "fit")
ScanPx = Annotated[int, integers(64, 4096, "motion is in pixels of it, and smaller pictures hide cuts", "pixels")]


@dataclass(frozen=True)
class Scan:
    """Of every video. ``px``: long side of what is looked at; motion scores depend on it."""

    px: ScanPx = 320
    shots: str = "scdet"

    name: ClassVar[str] = "scan"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[int] = 1
    columns: ClassVar[tuple[pa.Field, ...]] = (
        PROBLEM,
        titled("seconds", pa.float64(), "how long its frames are shown, in s"),
        titled("fps", pa.float64(), "frames/s, the mean"),
        titled("interlaced", pa.bool_(), "some frame is"),
        titled("begins", pa.list_(pa.float64()), "of every frame, s since the first; last: the end of the last frame"),
        titled("cuts", pa.list_(pa.int32()), "first frames of shots, by a detector other than scdet; null: scdet"),
        titled("change", SERIES, "scdet's score of every frame: 0 to 100, above 10 by default a cut"),
        titled("motion", SERIES, "vmafmotion of every frame"),
        titled("blur", SERIES, "blurdetect of every frame: width of edges in pixels; more is less sharp"),
        titled("luma", SERIES, "mean brightness of every frame, 0 to 255"),
        titled("difference", SERIES, "mean change of brightness since the frame before"),
        titled("vector", SERIES, "mean length of motion vectors after a re-encode, pixels a frame"),
        titled("right", SERIES, "of the content, pixels a frame"),
        titled("down", SERIES, "of the content, pixels a frame"),
        titled("grew", SERIES, "of the content, a share of its size a frame"),
        titled("fit", SERIES, "share of the vectors' energy that these three explain"),
        titled("thumbs", pa.list_(pa.binary()), "JPEG, one of every second"),
    )

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        return [{"id": row["id"], **self._scanned(Path(row["file"]), row["width"], row["height"])} for row in rows]

    def _scanned(self, path: Path, width: int, height: int) -> ClipRow:
        pass_ = _Pass(self.px, width, height, detector(self.shots))
        try:
            found = look_through(path, watch=pass_.see)
        except BadClip as bad:
            return {"problem": bad.reason if bad.time_s is None else f"{bad.reason} (at {float(bad.time_s):.3f} s)"}
        numbers = pass_.end()
        begins = [float(now - found.begins) for now in (*pass_.begins, found.ends)]
        return numbers | {
            "seconds": begins[-1],
            "fps": float(found.rate),
            "interlaced": found.interlaced,
            "begins": begins,
        }


class _Pass:
    """What is gathered of one video while its frames go by."""

    def __init__(self, px: int, width: int, height: int, shots: Detector | None) -> None:
        scale = px / max(width, height)
        self.width, self.height = (max(LEAST_SIDE_PX, round(side * scale / 2) * 2) for side in (width, height))
        self.begins: list[Fraction] = []
        self._graph: av.filter.Graph | None = None
        self._normaliser = Normaliser(self.width, self.height)
        self._shots = shots
        self._numbers: dict[str, list[float]] = {name: [] for name in NUMBERS}
        self._flows: list[Flow] = []
        self._thumbs: list[bytes] = []

    def see(self, frame: av.VideoFrame, now: Fraction, pixel_aspect: Fraction) -> None:
        """The next frame, as it is stored."""
        turn = turned(frame)
        assert turn is not None  # else refused
        size = (self.height, self.width) if turn[0] else (self.width, self.height)
        small = frame.reformat(width=size[0], height=size[1], format="yuv420p")
        small.pts, small.time_base = len(self.begins), Fraction(1, 25)
        if self._graph is None:
            self._graph = _graph(*size, turn)
        self.begins.append(now)
        self._graph.vpush(small)
        self._pull()

    def _pull(self) -> None:
        assert self._graph is not None
        while True:
            try:
                frame = self._graph.vpull()
            except (BlockingIOError, EOFError):
                return
            for name, key in NUMBERS.items():
                self._numbers[name].append(float(frame.metadata.get(key, 0.0)))
            second = (self.begins[len(self._numbers["change"]) - 1] - self.begins[0]) // Fraction(THUMB_EVERY_S)
            if second >= len(self._thumbs):
                self._thumbs.append(encode(thumb(frame.to_image())))
            if self._shots is not None:
                self._shots.see(frame)
            self._flows.extend(self._normaliser.next(frame))

    def end(self) -> ClipRow:
        """All of it, once the last frame was seen."""
        assert self._graph is not None
        self._graph.vpush(None)
        self._pull()
        self._flows.extend(self._normaliser.rest())
        count = len(self.begins)
        assert len(self._flows) == count and all(len(each) == count for each in self._numbers.values())
        flows = np.array([astuple(flow) for flow in self._flows])
        return {
            **self._numbers,
            **{name: [None if math.isnan(v) else float(v) for v in flows[:, i]] for i, name in enumerate(FLOWS)},
            "cuts": None if self._shots is None else self._shots.cuts(),
            "thumbs": self._thumbs,
        }


def _graph(width: int, height: int, turn: tuple[bool, bool, bool]) -> av.filter.Graph:
    """From small pictures as they are stored to upright ones with numbers in their metadata."""
    transposed, mirrored, flipped = turn
    turns = [("transpose", "dir=0")] * transposed + [("hflip", "")] * mirrored + [("vflip", "")] * flipped
    graph = av.filter.Graph()
    last = graph.add_buffer(width=width, height=height, format=VideoFormat("yuv420p"), time_base=Fraction(1, 25))
    for name, options in (*turns, *FILTERS, ("buffersink", "")):
        following = graph.add(name, options)
        last.link_to(following)
        last = following
    graph.configure()
    return graph
