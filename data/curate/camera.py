"""The paper's camera classes, and the shipped guess at six of them: what motion vectors say of pan, tilt and zoom.

A caption begins with its clip's class where that is confident (Movie Gen, 3.2.1). What separates a push in from a zoom
in, or a truck from a pan, is depth, which vectors of a whole picture do not show: for those give a classifier's weights
(``measure.camera``). Six more classes are told by hand for fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from ...documents import read_yaml
from ...errors import CinemeshError, did_you_mean
from ...ranges import check_ranges, integers, reals
from ...reading import read_record
from ..scenes import Frame
from .embedders import IMAGENET, TEMPERATURE, ClipModel, onnx_network, pixels, scripted
from .pictures import decode
from .rows import ClipRow, titled

CLASSES = (
    *("zoom in", "zoom out", "push in", "pull out", "pan right", "pan left", "truck right", "truck left"),
    *("tilt up", "tilt down", "pedestal up", "pedestal down", "arc", "tracking", "static", "handheld"),
)  # the paper's 16, by a classifier
BY_HAND = ("wide angle", "close-up", "aerial", "low angle", "over shoulder", "first person")  # 6 more, of SFT
STATIC_PX = 0.15  # pixels a frame at the scan's size, below which nothing moves
LEAST_GREW = 0.0015  # of the size a frame: 4 % a second, below which no zoom is seen
LEAST_SHIFT_PX = 0.3  # pixels a frame, below which no pan is seen

FLOW_COLUMNS = (
    titled("camera", pa.string(), "the most likely class; null: none of those that are known"),
    titled("camera_confidence", pa.float32(), "of that class, 0 to 1"),
)
Confidence = Annotated[float, reals(0.01, 1, "a confidence is a probability")]


@dataclass(frozen=True)
class CameraPrefix:
    """Where a caption begins with its camera class."""

    least_confidence: Confidence = 0.8

    def __post_init__(self) -> None:
        check_ranges(self, "camera_prefix.")

    def of(self, row: ClipRow) -> str | None:
        """The class that the caption of ``row`` begins with."""
        told = row.get("camera_by_hand")
        if told is not None:
            return told
        sure = row.get("camera") is not None and row["camera_confidence"] >= self.least_confidence
        return row["camera"] if sure else None


@dataclass(frozen=True)
class HandLabel:
    """A camera class that a person told, of frames of a file."""

    file: str
    first_frame: Frame
    last_frame: Frame
    camera: str


def read_labels(path: Path) -> list[HandLabel]:
    """A YAML list of mappings with the fields of ``HandLabel``. Raises CinemeshError."""
    rows = read_yaml(path, "the labels file", "correct it or labels")
    if not isinstance(rows, list):
        raise CinemeshError(f"the labels file {path} is no list", remedy="write one entry a label")
    labels = [read_record(HandLabel, row, f"label {index + 1} of {path}") for index, row in enumerate(rows)]
    for label in labels:
        if label.camera not in (*CLASSES, *BY_HAND):
            raise CinemeshError(
                f"{path}: camera is {label.camera!r:.100}", remedy=did_you_mean(label.camera, (*CLASSES, *BY_HAND))
            )
    return labels


def camera_of(vector: Any, right: Any, down: Any, grew: Any, fit: Any) -> ClipRow:
    """From the flow of every frame of a clip: a class, and how sure it is.

    Sure is a move that explains the vectors of every frame, alone, and goes one way throughout. What a shift leaves
    over of the vectors' energy counts twice, since an object that fills most of the picture, or depth, leaves little;
    a zoom always leaves some: vectors are of half pixels, and none where it begins.
    """
    known = ~np.isnan(vector)
    if not known.any():
        return {"camera": None, "camera_confidence": None}
    length = float(vector[known].mean())
    if length < STATIC_PX:
        return {"camera": "static", "camera_confidence": 1 - length / STATIC_PX / 2}
    explained = float(np.average(fit[known], weights=vector[known]))
    moves = (
        (grew[known], LEAST_GREW, "zoom in", "zoom out", 1),
        (-right[known], LEAST_SHIFT_PX, "pan right", "pan left", 2),  # the content goes the other way
        (down[known], LEAST_SHIFT_PX, "tilt up", "tilt down", 2),
    )
    strengths = [abs(float(values.mean())) / least for values, least, *_ in moves]
    best = int(np.argmax(strengths))
    values, least, forth, back, rest_counts = moves[best]
    mean = float(values.mean())
    if abs(mean) < least:
        return {"camera": None, "camera_confidence": None}
    throughout = float((values * np.sign(mean) > least / 2).mean())
    alone = strengths[best] / sum(strengths)
    sure = max(0.0, explained) ** rest_counts * throughout * alone
    return {"camera": forth if mean > 0 else back, "camera_confidence": sure}


@dataclass(frozen=True)
class CameraSettings:
    """A classifier of the 16 classes, of the user's.

    ``torchscript`` or ``onnx``, with a number for each in the order of ``CLASSES``; or ``clip``, a directory that is
    asked for "a video with camera motion: CLASS".
    """

    kind: str
    path: str
    px: Annotated[int, integers(16, 2048, "the network's own", "pixels")] = 224

    def __post_init__(self) -> None:
        check_ranges(self, "camera: ")
        if self.kind not in _KINDS:
            raise CinemeshError(f"kind is {self.kind!r:.100}", remedy=did_you_mean(self.kind, _KINDS))
        if not Path(self.path).exists():
            raise CinemeshError(f"path is {self.path}, which is not there", remedy="name the classifier's weights")


@dataclass(frozen=True)
class CameraMeasure:
    """Of every clip, by a classifier's weights, in place of the guess from motion vectors."""

    classifier: CameraSettings
    weights: str

    name: ClassVar[str] = "camera"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("samples",)
    unit: ClassVar[int] = 16
    columns: ClassVar[tuple[pa.Field, ...]] = FLOW_COLUMNS

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        classify = _classifier(self.classifier)
        made: list[ClipRow] = []
        for row in rows:
            chances = classify([decode(data) for data in row["samples"]]).mean(0)
            best = int(chances.argmax())
            made.append({"id": row["id"], "camera": CLASSES[best], "camera_confidence": float(chances[best])})
        return made


_KINDS = ("clip", "torchscript", "onnx")


@cache
def _classifier(settings: CameraSettings) -> Callable[[Sequence[Image.Image]], Any]:
    """From pictures to the probability of every class, [N, 16]."""
    path = Path(settings.path)
    if settings.kind == "clip":
        clip = ClipModel(path)
        texts = clip.texts([f"a video with camera motion: {name}" for name in CLASSES])
        return lambda images: softmax(clip.pictures(images) @ texts.T / TEMPERATURE)
    run = scripted(path, "a camera classifier") if settings.kind == "torchscript" else onnx_network(path)

    def classes(images: Sequence[Image.Image]) -> Any:
        with torch.no_grad():
            told = np.asarray(run(pixels(images, settings.px, settings.px, IMAGENET)), np.float64)
        if told.shape != (len(images), len(CLASSES)):
            raise CinemeshError(
                f"the camera classifier {path} gives {told.shape[1:]} numbers a picture",
                remedy=f"it must give {len(CLASSES)}: {', '.join(CLASSES)}",
            )
        return softmax(told)

    return classes


def softmax(logits: Any) -> Any:
    """Over the last dim."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
