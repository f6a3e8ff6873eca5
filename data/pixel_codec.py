"""Windows kept as they are decoded: the codec that changes nothing, for what learns from pixels.

An autoencoder is trained on the same cache as the transformer, of pixels in place of latents: one place decides which
frames a window has, how they are scaled and cropped, what is skipped, and what a cache was made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .codec import LatentCodec
from .encoding import CodecSettings, Encoding


class PixelCodec:
    """Latents are uint8 [3, T, H, W], 0 to 255."""

    channels = 3
    temporal_stride = spatial_stride = 1
    errors = "A value is a pixel."
    fingerprint = "pixels-1"

    def __init__(self) -> None:
        self.mean, self.std = torch.zeros(3), torch.ones(3)

    def latent_frames(self, frames: int) -> int:
        return frames

    def encode(self, frames: Tensor) -> Tensor:
        """See ``LatentCodec.encode``, but for the dtype and the normalisation."""
        return frames.permute(3, 0, 1, 2).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """See ``LatentCodec.decode``."""
        return latent.permute(1, 2, 3, 0).contiguous()


@dataclass(frozen=True, kw_only=True)
class PixelSettings(CodecSettings):
    """Of no recipe of a transformer: it learns from latents."""

    kind: Literal["pixels"] = "pixels"

    def build(self) -> LatentCodec:
        return PixelCodec()


def unencoded() -> Encoding:
    """Windows as they are, and no captions."""
    return Encoding(PixelSettings(), PixelCodec(), ())
