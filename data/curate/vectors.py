"""Motion vectors of a video, after a re-encode that makes them comparable, and what camera they fit.

Vectors of the file itself tell what its encoder searched for and skipped: 0.2 pixels a frame of a starved one, 0.8 of
its clean twin. So every picture, at one size, is encoded once more by one encoder with one setting and no B-frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.codec.context import Flags2
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from numpy.typing import NDArray

CODEC = "mpeg4"  # FFmpeg's own, in every build; its search takes no rate into account at a fixed quantiser
OPTIONS = {"flags": "+qscale", "global_quality": str(3 * 118)}  # quantiser 3; 118: FF_QP2LAMBDA
KEY_FRAMES = 600  # frames between two pictures without vectors, its most


@dataclass(frozen=True)
class Flow:
    """What the picture did since the one before, in pixels a frame. All nan: the encoder saw no likeness.

    ``length``: mean of the vectors. The content moved by ``right``, ``down`` and grew by ``grew`` of its size; ``fit``
    of the vectors' energy is explained by that.
    """

    length: float = math.nan
    right: float = math.nan
    down: float = math.nan
    grew: float = math.nan
    fit: float = math.nan


class Normaliser:
    """Encodes pictures of one size and tells how each moved, one behind: a ``Flow`` for every picture in the end."""

    def __init__(self, width: int, height: int) -> None:
        self._encoder = cast(VideoCodecContext, av.CodecContext.create(CODEC, "w"))
        self._encoder.width, self._encoder.height, self._encoder.pix_fmt = width, height, "yuv420p"
        self._encoder.time_base, self._encoder.options = Fraction(1, 25), OPTIONS
        self._encoder.gop_size, self._encoder.max_b_frames, self._encoder.thread_count = KEY_FRAMES, 0, 1
        self._decoder = cast(VideoCodecContext, av.CodecContext.create(CODEC, "r"))
        self._decoder.flags2 |= Flags2.export_mvs
        self._decoder.thread_count = 1
        self._centre = np.array([width, height]) / 2
        self._count = 0

    def next(self, frame: av.VideoFrame) -> Iterator[Flow]:
        """``frame``: yuv420p of that size."""
        frame.pts, frame.pict_type = self._count, PictureType.NONE
        self._count += 1
        yield from self._flows(self._encoder.encode(frame))

    def rest(self) -> Iterator[Flow]:
        yield from self._flows(self._encoder.encode(None))
        for frame in self._decoder.decode(None):
            yield self._flow(frame)

    def _flows(self, packets: Sequence[Packet]) -> Iterator[Flow]:
        for packet in packets:
            for frame in self._decoder.decode(packet):
                yield self._flow(frame)

    def _flow(self, frame: av.VideoFrame) -> Flow:
        told: Any = frame.side_data.get("MOTION_VECTORS")
        return Flow() if told is None else fitted_flow(told.to_ndarray(), self._centre)


def fitted_flow(vectors: NDArray[Any], centre: NDArray[np.float64]) -> Flow:
    """Shift and growth about ``centre`` (x, y) by least squares; ``vectors`` as FFmpeg exports them, one a block."""
    if not len(vectors):
        return Flow()
    # A vector leads from a block to where its content was.
    moved = -np.stack([vectors["motion_x"], vectors["motion_y"]], 1) / vectors["motion_scale"][:, None]
    weight = (vectors["w"].astype(np.float64) * vectors["h"])[:, None]
    weight /= weight.sum()
    place = np.stack([vectors["dst_x"], vectors["dst_y"]], 1) - centre
    shift, middle = (weight * moved).sum(0), (weight * place).sum(0)
    off = place - middle
    spread = float((weight * off**2).sum())
    grew = float((weight * off * (moved - shift)).sum()) / spread if spread else 0.0
    left = moved - shift - grew * off
    energy = float((weight * moved**2).sum())
    fit = 1 - float((weight * left**2).sum()) / energy if energy else 0.0
    at_centre = shift - grew * middle
    length = float((weight[:, 0] * np.hypot(moved[:, 0], moved[:, 1])).sum())
    return Flow(length, float(at_centre[0]), float(at_centre[1]), grew, fit)
