"""Inflation: a temporal autoencoder begins as an image autoencoder. Movie Gen 3.1.1.

The spatial weights are the image's; what is added over time begins as nothing (``layers``). With convolutions over
both (``3d``) the image's kernel is the one of the middle frame. Untrained, an inflated autoencoder is bit for bit the
image autoencoder: of an image, and of every eighth frame of a clip.

Image autoencoders are ours, or ``AutoencoderKL`` of the package diffusers, whose parameters are called alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...documents import parse_json, quoted
from ...errors import CinemeshError, in_a_line
from .autoencoder import Autoencoder
from .config import TAPS

CONFIGURATION, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' own names
IMAGE = "AutoencoderKL"
REMEDY = f"name a directory that diffusers' save_pretrained wrote of an {IMAGE}, or one of cinemesh tae train"
# FrameAttention as diffusers called it before 0.17; its weights were 1 x 1 convolutions in LDM.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Inflated:
    """Names of parameters: ``taken`` from the image; of another shape there; in the image alone."""

    taken: tuple[str, ...]
    other_shape: tuple[str, ...]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        said = f"{len(self.taken)} parameters are the image autoencoder's"
        if self.other_shape:
            said += f"; {len(self.other_shape)} have other shapes there and begin anew: {', '.join(self.other_shape)}"
        if self.unknown:
            said += f"; of its own, {len(self.unknown)} have no place here: {', '.join(self.unknown)}"
        return said


@torch.no_grad()
def inflate(net: Autoencoder, image: Mapping[str, Tensor]) -> Inflated:
    """Give ``net``, which is initialised, the weights of an image autoencoder, by name, where shapes match.

    Raises CinemeshError where none does: the two are of other forms.
    """
    own = dict(net.named_parameters())
    taken, other = [], []
    for name, value in image.items():
        if name not in own:
            continue
        into = own[name]
        deep = into.dim() == 5 and value.dim() == 4  # over time, too
        if (into.shape[:2] + into.shape[3:] if deep else into.shape) != value.shape:
            other.append(name)
            continue
        if deep:
            into.zero_()
            into[:, :, TAPS // 2] = value
        else:
            into.copy_(value)
        taken.append(name)
    if not taken:
        raise CinemeshError(
            f"start_from: none of its {len(image)} parameters has a name and shape of autoencoder {net.config.name}",
            remedy="take the width, multipliers and blocks of the image autoencoder",
        )
    return Inflated(tuple(taken), tuple(other), tuple(name for name in image if name not in own))


def read_diffusers_image(path: Path) -> dict[str, Tensor]:
    """Weights of an AutoencoderKL, float32, by our names. Nothing of diffusers is needed. Raises CinemeshError."""
    where = f"start_from: {path}"
    try:
        stated = parse_json((path / CONFIGURATION).read_text(encoding="utf-8"), where, REMEDY)
        if not isinstance(stated, dict) or stated.get("_class_name") != IMAGE:
            said = quoted(stated.get("_class_name") if isinstance(stated, dict) else stated)
            raise CinemeshError(f"{where} is a {said}", remedy=REMEDY)
        with safe_open(path / WEIGHTS, framework="pt") as file:
            return {_ours(name): _linear(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  its own
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise CinemeshError(f"{where} holds no autoencoder ({in_a_line(error)})", remedy=REMEDY) from error


def _ours(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _linear(name: str, value: Tensor) -> Tensor:
    """Of attention, a 1 x 1 convolution is a linear map."""
    return (value[..., 0, 0] if ".attentions." in name and value.dim() == 4 else value).float()
