"""The block DCT's latents, decoded with what their neighbours say: a linear map of 3x3x3 latents to a block's pixels.

A block's own coefficients leave out detail and motion that its neighbours' tell in part. What they tell is fitted by
least squares to the error of the fixed decoder, so that with nothing to learn from it stays the fixed one. A mirrored
clip, or one played backwards, is as likely, so the fit is the one of all eight mirrorings. ``SHIPPED`` is that of the
quick start's training windows, one every four frames (`cinemesh codec fit --set data.stride=4`).

    C channels   t, h, w latent dims   P = 8 * 8 * 8 * 3 pixel values of a block
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CinemeshError
from ..files import atomic_file
from .codec import COEFFICIENTS, STRIDE, BlockDCTCodec

SHIPPED = Path(__file__).parent.parent / "configs" / "dct-context.safetensors"
REACH = 3  # latents along time, height and width that a block is decoded from
RIDGE = 1e-4  # beside latents of unit variance: 0.1 dB better on held-out windows than 1e-2, as good as 1e-3
TENSOR, LATENTS_OF = "correction", "latents"
BLOCK = (STRIDE, STRIDE, STRIDE, 3)  # P: frames, rows, columns, colours


class ContextDCTCodec(BlockDCTCodec):
    """Encodes as ``BlockDCTCodec`` does; ``correction`` [P, C, 3, 3, 3] is added to what that decodes, in [-1, 1]."""

    errors = (
        "A latent holds 16 numbers for a block of 8 frames of 8 x 8 pixels, which is decoded from its neighbours' "
        "numbers too: an error in one of them shows as a blurred square."
    )

    def __init__(self, correction: Tensor) -> None:
        super().__init__()
        self.correction = correction.float()

    def blocks(self, latent: Tensor) -> Tensor:
        """As the fixed codec's, and what the neighbours add; at a border the nearest latent is its own neighbour."""
        added = F.conv3d(_padded(latent), self.correction)[0]
        return super().blocks(latent) + added.flatten(1).T

    @classmethod
    def read(cls, path: Path) -> Self:
        """What ``write`` wrote. Raises CinemeshError for another file, and for one fitted to other latents."""
        try:
            with safe_open(path, framework="pt") as file:
                correction, made_of = file.get_tensor(TENSOR), (file.metadata() or {}).get(LATENTS_OF)
        except (OSError, SafetensorError) as error:
            raise CinemeshError(
                f"codec.decoder: {path} is no decoder ({error})", remedy="name a file that cinemesh codec fit wrote"
            ) from error
        codec = cls(correction)
        shape = [torch.Size(BLOCK).numel(), codec.channels, *[REACH] * 3]
        if made_of != codec.fingerprint or list(correction.shape) != shape:
            raise CinemeshError(
                f"codec.decoder: {path} decodes latents of {made_of} by {list(correction.shape)}, and the codec's are "
                f"those of {codec.fingerprint}, which need {shape}",
                remedy="fit it again: cinemesh codec fit",
            )
        return codec

    def write(self, path: Path) -> None:
        """In half precision: the pixels that it gives differ by less than their rounding."""
        with atomic_file(path) as part:
            save_file({TENSOR: self.correction.half()}, part, metadata={LATENTS_OF: self.fingerprint})


def fit(windows: Iterable[tuple[float, Tensor]]) -> ContextDCTCodec:
    """The decoder of least squares for ``windows``: weight, and frames uint8 [T, H, W, 3] whose T is whole blocks.

    Of the windows one is in memory, and what is summed over them.
    """
    codec = BlockDCTCodec()
    inputs, outputs = codec.channels * REACH**3, torch.Size(BLOCK).numel()
    moments = torch.zeros(inputs, inputs, dtype=torch.float64)
    products = torch.zeros(inputs, outputs, dtype=torch.float64)
    total = 0.0
    for weight, frames in windows:
        latent = codec.encode(frames)
        seen, blocks = _neighbourhoods(latent), codec.pixels(frames)
        missed = blocks - codec.blocks(latent)
        moments += weight / len(seen) * (seen.T @ seen).double()
        products += weight / len(seen) * (seen.T @ missed).double()
        total += weight
    assert total > 0  # at least one window
    moments, products = _mirrored_mean(moments / total, products / total)
    moments.diagonal().add_(RIDGE)
    found = torch.linalg.solve(moments, products)
    return ContextDCTCodec(found.T.reshape(outputs, codec.channels, *[REACH] * 3).contiguous())


def _padded(latent: Tensor) -> Tensor:
    return F.pad(latent[None], [REACH // 2] * 6, mode="replicate")


def _neighbourhoods(latent: Tensor) -> Tensor:
    """[C, t, h, w] -> [t h w, C * 27], in the order of a kernel of conv3d."""
    around = _padded(latent)[0]
    for dim in (1, 2, 3):
        around = around.unfold(dim, REACH, 1)
    return around.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2)


def _mirrored_mean(moments: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the windows together with all their mirrorings in time, height and width."""
    channels = len(COEFFICIENTS)
    around = (channels, *[REACH] * 3)
    moments, products = moments.view(*around, *around), products.view(*around, *BLOCK)
    odd = torch.tensor([c.frequency for c in COEFFICIENTS]) % 2  # its cosine changes its sign when mirrored
    sums = torch.zeros_like(moments), torch.zeros_like(products)
    mirrorings = list(product((0, 1), repeat=3))
    for mirrored in mirrorings:
        sign = (1.0 - 2.0 * ((odd @ torch.tensor(mirrored)) % 2)).view(-1, 1, 1, 1).double()
        axes = [axis for axis in range(3) if mirrored[axis]]
        turned = [1 + axis for axis in axes] + [5 + axis for axis in axes]
        sums[0].add_(moments.flip(turned) * sign.view(-1, *[1] * 7) * sign)
        sums[1].add_(products.flip([1 + axis for axis in axes] + [4 + axis for axis in axes]) * sign.view(-1, *[1] * 7))
    inputs = channels * REACH**3
    return sums[0].reshape(inputs, inputs) / len(mirrorings), sums[1].reshape(inputs, -1) / len(mirrorings)
