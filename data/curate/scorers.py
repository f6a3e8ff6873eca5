"""Scorers: from the pictures of a clip to one number, with a limit in a preset. One protocol for all there are.

    sharpness, contrast, colour     ship: a line of numpy each
    laion                           the aesthetic predictor over CLIP features: its head's file, a CLIP directory
    clip                            how much more a clip is like ``texts`` than like ``against``, by a CLIP directory:
                                    for effects, slides, safety, whatever words tell
    detector                        share of the picture that the largest object takes, by an object detection
                                    directory of transformers: small subjects
    torchscript, onnx               any network of pictures to numbers: quality, safety

A limit belongs to a scorer: the paper's 4.0 is LAION's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from ...errors import CinemeshError, did_you_mean, in_a_line
from ...ranges import check_ranges, integers, reals
from .embedders import (
    IMAGENET,
    TEMPERATURE,
    ClipModel,
    EmbedderSettings,
    fingerprint,
    onnx_network,
    pixels,
    scripted,
    transformers_of,
)
from .pictures import decode
from .rows import ClipRow, titled

LIGHT_PX = 256  # side at which the shipped ones look
SURE = 0.5  # of a detector: an object
Side = Annotated[int, integers(16, 2048, "the network's own", "pixels")]
Output = Annotated[int, integers(0, 10**5, "which number of the network's")]
Limit = Annotated[float, reals(-1e9, 1e9, "a score")]


class Scorer(Protocol):
    def score(self, images: Sequence[Image.Image]) -> float:
        """Of a clip, from its sampled frames; pure."""
        ...


@dataclass(frozen=True)
class ScorerSettings:
    """``kind`` as above; ``path`` of its weights, ``clip`` of the CLIP directory under them.

    ``output``: of a network's numbers, which one; ``px``: the side of its pictures; ``middle``: only the middle sample
    is asked.
    """

    kind: str
    path: str | None = None
    clip: str | None = None
    texts: tuple[str, ...] = ()
    against: tuple[str, ...] = ("a photo",)
    px: Side = 224
    output: Output = 0
    middle: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "score: ")
        if self.kind not in _BUILDERS:
            raise CinemeshError(f"kind is {self.kind!r:.100}", remedy=did_you_mean(self.kind, _BUILDERS))

    def check(self, where: str) -> None:
        """Raises CinemeshError where weights or texts are not given or not there."""
        if self.kind in ("laion", "detector", "torchscript", "onnx") and not (self.path and Path(self.path).exists()):
            raise CinemeshError(
                f"{where} is {self.kind}, and its path is {self.path}",
                remedy="give it weights of yours, or switch the score off with its limit: null in scores",
            )
        if self.kind in ("laion", "clip"):
            EmbedderSettings("clip", self.clip).check(f"{where}.clip")
        if self.kind == "clip" and not self.texts:
            raise CinemeshError(f"{where} is clip and has no texts", remedy="say what it scores: texts: [a slide]")

    @property
    def fingerprint(self) -> str:
        """Of all weights."""
        return "-".join(fingerprint(each) for each in (self.path, self.clip) if each is not None)


@dataclass(frozen=True)
class ScoreMeasure:
    """Of every clip. ``weights``: fingerprint of the scorer's."""

    scorer: ScorerSettings
    weights: str

    name: ClassVar[str] = "score"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("samples",)
    unit: ClassVar[int] = 16
    columns: ClassVar[tuple[pa.Field, ...]] = (titled("score", pa.float32(), "by the scorer"),)

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        scorer = _built(self.scorer)
        made: list[ClipRow] = []
        for row in rows:
            data = row["samples"]
            asked = data[len(data) // 2 :][:1] if self.scorer.middle else data
            made.append({"id": row["id"], "score": scorer.score([decode(each) for each in asked])})
        return made


@dataclass(frozen=True)
class ScoreLimits:
    """From ``least`` to ``most``. ``scorer``: the kind whose limits these are; it must be the one that measures."""

    scorer: str
    least: Limit | None = None
    most: Limit | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "scores: ")

    def wrong(self, score: float) -> str | None:
        """How it is outside."""
        if self.least is not None and score < self.least:
            return f"{score:.2f}, below {self.least:g}"
        return None if self.most is None or score <= self.most else f"{score:.2f}, above {self.most:g}"


class _Light:
    """The mean over pictures of something that numpy tells."""

    def __init__(self, of: Callable[[Any], float]) -> None:
        self._of = of

    def score(self, images: Sequence[Image.Image]) -> float:
        return float(np.mean([self._of(_light(image)) for image in images]))


def _light(image: Image.Image) -> Any:
    made = image.copy()
    made.thumbnail((LIGHT_PX, LIGHT_PX))
    return np.asarray(made, np.float64)  # [H, W, 3]


def sharpness(picture: Any) -> float:
    """Deviation of the Laplacian of brightness, of 255."""
    grey = picture.mean(2)
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).std())


def contrast(picture: Any) -> float:
    """Deviation of brightness, of 255."""
    return float(picture.mean(2).std())


def colour(picture: Any) -> float:
    """Hasler and Suesstrunk 2003: 0 is grey, 100 is extreme."""
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    first, second = red - green, (red + green) / 2 - blue
    return float(np.hypot(first.std(), second.std()) + 0.3 * np.hypot(first.mean(), second.mean()))


class Laion:
    """LAION's aesthetic predictors: a linear layer or a few of them over CLIP's picture vectors of length 1."""

    def __init__(self, head: Path, clip: Path) -> None:
        try:
            weights: dict[str, Tensor] = torch.load(head, map_location="cpu", weights_only=True)
            names = [name for name in weights if name.endswith("weight")]
            self._layers = [(weights[name], weights[f"{name.removesuffix('weight')}bias"]) for name in names]
        except (OSError, RuntimeError, KeyError, AttributeError) as error:
            raise CinemeshError(
                f"{head} is no head of LAION's aesthetic predictor: {in_a_line(error, lines=1)}",
                remedy="name the .pth file of its layers",
            ) from error
        self._clip = ClipModel(clip)

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image]) -> float:
        values = torch.from_numpy(self._clip.pictures(images))
        for weight, bias in self._layers:  # between them only dropout stands
            values = values @ weight.float().T + bias.float()
        return float(values.mean())


class ClipTexts:
    """Probability of ``texts`` beside ``against``, at CLIP's own temperature."""

    def __init__(self, clip: Path, texts: Sequence[str], against: Sequence[str]) -> None:
        self._clip, self._count = ClipModel(clip), len(texts)
        self._texts = self._clip.texts([*texts, *against])

    def score(self, images: Sequence[Image.Image]) -> float:
        logits = torch.from_numpy(self._clip.pictures(images) @ self._texts.T) / TEMPERATURE
        return float(logits.softmax(1)[:, : self._count].sum(1).mean())


class LargestObject:
    """Share of the picture that the largest object takes, the mean over pictures."""

    def __init__(self, path: Path, px: int) -> None:
        transformers = transformers_of("detector")
        try:
            detector = transformers.AutoModelForObjectDetection
            found = detector.from_pretrained(str(path), local_files_only=True)  # nosec B615  a directory of the user's
            self._model: Any = found.eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise CinemeshError(
                f"transformers cannot read an object detector from {path}: {in_a_line(error)}",
                remedy="name a directory of DETR, YOLOS or another that AutoModelForObjectDetection reads",
            ) from error
        self._px = px

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image]) -> float:
        told = self._model(pixel_values=pixels(images, self._px, self._px, IMAGENET))
        sure = told.logits.softmax(-1)[..., :-1].amax(-1) > SURE  # the last class is no object
        areas = (told.pred_boxes[..., 2] * told.pred_boxes[..., 3]) * sure
        return float(areas.amax(1).mean())


class ScoreNetwork:
    """One output of a network of pictures, the mean over them; ``run`` from float32 [N, 3, px, px] to [N, ...]."""

    def __init__(self, run: Callable[[Tensor], Any], px: int, output: int) -> None:
        self._run, self._px, self._output = run, px, output

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image]) -> float:
        told = torch.as_tensor(self._run(pixels(images, self._px, self._px, IMAGENET))).reshape(len(images), -1)
        if self._output >= told.shape[1]:
            raise CinemeshError(
                f"output is {self._output}, and the network gives {told.shape[1]} numbers a picture",
                remedy=f"name one of 0 to {told.shape[1] - 1}",
            )
        return float(told[:, self._output].float().mean())


_BUILDERS: dict[str, Callable[[ScorerSettings], Scorer]] = {
    "sharpness": lambda _: _Light(sharpness),
    "contrast": lambda _: _Light(contrast),
    "colour": lambda _: _Light(colour),
    "laion": lambda given: Laion(Path(given.path or ""), Path(given.clip or "")),
    "clip": lambda given: ClipTexts(Path(given.clip or ""), given.texts, given.against),
    "detector": lambda given: LargestObject(Path(given.path or ""), given.px),
    "torchscript": lambda given: ScoreNetwork(scripted(Path(given.path or ""), "a scorer"), given.px, given.output),
    "onnx": lambda given: ScoreNetwork(onnx_network(Path(given.path or "")), given.px, given.output),
}


@cache
def _built(settings: ScorerSettings) -> Scorer:
    return _BUILDERS[settings.kind](settings)
