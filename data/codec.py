"""Video to latents and back: the interface, and a fixed codec that needs no training.

The paper's temporal autoencoder (3.1.1) is learned and compresses 8x along time, height and
width into 16 channels. ``BlockDCTCodec`` has the same latent shape and is a fixed linear map: each
block of 8 frames x 8 x 8 pixels is written in an orthonormal basis, cosines along time, height and
width (DCT-II) times an opponent-colour axis; the 16 coefficients with most energy are kept and
normalised. The basis is orthonormal, so decoding is the transposed map (``context_codec.py``
decodes the same latents better). A learned autoencoder replaces it by meeting ``LatentCodec``.

    T frames   H, W pixels   C channels   t, h, w latent dims: t = ceil(T / 8), h = H / 8, w = W / 8
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import CinemeshError

STRIDE = 8  # temporal and spatial compression of the paper's autoencoder, 3.1.1


class LatentCodec(Protocol):
    """What the data cache and the sampler need of an autoencoder."""

    channels: int
    temporal_stride: int
    spatial_stride: int
    mean: Tensor  # float32 [C], of each channel before it is normalised: ``encode`` takes it away
    std: Tensor  # float32 [C], likewise: ``encode`` divides by it
    errors: str  # how an error in a latent looks, in a sentence for whoever sees a clip

    @property
    def fingerprint(self) -> str:
        """Changes whenever ``encode`` would give other latents: a cache of another is rebuilt."""
        ...

    def latent_frames(self, frames: int) -> int:
        """T -> t: frames of the latent of so many frames."""
        ...

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3] -> latent float32 [C, t, h, w], t as ``latent_frames`` says.

        A channel has about zero mean and unit variance.
        Raises CinemeshError when H or W does not divide by ``spatial_stride``.
        """
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [C, t, h, w] -> frames uint8 [at least T, H, W, 3]; the caller cuts those past T."""
        ...


@runtime_checkable
class TiledCodec(LatentCodec, Protocol):
    """A codec that decodes a clip of any length in constant memory."""

    def decoded(self, latent: Tensor) -> Iterator[Tensor]:
        """As ``decode``, in pieces of the clip, one after the other."""
        ...


def clip_pieces(codec: LatentCodec, latent: Tensor, frames: int) -> Iterator[Tensor]:
    """The first ``frames`` of a decoded clip, in pieces uint8 [T, H, W, 3]: tile by tile where the codec has tiles."""
    for piece in codec.decoded(latent) if isinstance(codec, TiledCodec) else (codec.decode(latent),):
        if frames > 0:
            yield piece[:frames]
        frames -= len(piece)


class Coefficient(NamedTuple):
    """One channel: colour axis, cosine index along (time, height, width), its mean and std."""

    colour: int
    frequency: tuple[int, int, int]
    mean: float
    std: float


# The 14 luma and 2 chroma coefficients with most energy over the training frames of the seven
# quick-start scenes (configs/captions.yaml) at 128 px, each scene weighing the same. Mean and std
# are measured over those frames, for pixels in [-1, 1]; a coefficient other than a block's average
# has a mean within 0.1 std of zero, taken as zero.
COEFFICIENTS = (
    Coefficient(0, (0, 0, 0), -5.608, 16.21),
    Coefficient(0, (1, 0, 0), 0.0, 3.563),
    Coefficient(0, (0, 0, 1), 0.0, 3.523),
    Coefficient(0, (0, 1, 0), 0.0, 3.165),
    Coefficient(0, (2, 0, 0), 0.0, 1.937),
    Coefficient(0, (0, 2, 0), 0.0, 1.567),
    Coefficient(0, (0, 0, 2), 0.0, 1.547),
    Coefficient(0, (0, 1, 1), 0.0, 1.464),
    Coefficient(0, (3, 0, 0), 0.0, 1.250),
    Coefficient(0, (1, 0, 1), 0.0, 1.222),
    Coefficient(0, (4, 0, 0), 0.0, 1.048),
    Coefficient(0, (1, 1, 0), 0.0, 1.010),
    Coefficient(0, (0, 2, 1), 0.0, 0.9546),
    Coefficient(0, (0, 1, 2), 0.0, 0.8896),
    Coefficient(1, (0, 0, 0), 1.202, 3.158),
    Coefficient(2, (0, 0, 0), -0.5724, 2.034),
)

# Orthogonal axes of (red, green, blue), normalised below: luma, red - blue, magenta - green.
OPPONENT_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


class BlockDCTCodec:
    """Sixteen normalised coefficients of the 8x8x8 block DCT: fixed, linear, float32, CPU."""

    name = "block-dct"
    channels = len(COEFFICIENTS)
    temporal_stride = STRIDE
    spatial_stride = STRIDE
    errors = (
        f"A latent holds {len(COEFFICIENTS)} numbers for a block of {STRIDE} frames of {STRIDE} x {STRIDE} pixels, so "
        "an error in one of them shows on the whole block as a square."
    )

    def __init__(self) -> None:
        self._keep(COEFFICIENTS)

    def _keep(self, coefficients: Sequence[Coefficient]) -> None:
        """These, of blocks of the strides."""
        self.coefficients = coefficients
        self.basis = _basis(self.temporal_stride, self.spatial_stride, coefficients)  # orthonormal rows
        self.mean = torch.tensor([c.mean for c in coefficients])
        self.std = torch.tensor([c.std for c in coefficients])

    @property
    def fingerprint(self) -> str:
        """A hash of every constant of the codec."""
        constants = repr((self.spatial_stride, OPPONENT_AXES, [tuple(c) for c in self.coefficients]))
        return f"{self.name}-{hashlib.sha256(constants.encode()).hexdigest()[:16]}"

    def latent_frames(self, frames: int) -> int:
        return math.ceil(frames / self.temporal_stride)

    def encode(self, frames: Tensor) -> Tensor:
        """See ``LatentCodec.encode``. The last frame is repeated to fill the last block."""
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
            raise CinemeshError(
                f"frames are {frames.dtype} {list(frames.shape)}", remedy="a clip is uint8 [T, H, W, 3]"
            )
        (height, width), side = frames.shape[1:3], self.spatial_stride
        if not len(frames) or not height or not width or height % side or width % side:
            raise CinemeshError(
                f"{len(frames)} frames of {height} x {width} pixels: {height} % {side} = "
                f"{height % side}, {width} % {side} = {width % side}",
                remedy=f"a clip has a frame at least and both sizes are positive multiples of {side}: resize or crop",
            )
        values = (self.pixels(frames) @ self.basis.T - self.mean) / self.std
        return values.T.reshape(self.channels, -1, height // side, width // side).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """See ``LatentCodec.decode``.

        Raises CinemeshError for a wrong channel count and for values that are not finite.
        """
        if latent.dim() != 4 or latent.shape[0] != self.channels:
            raise CinemeshError(f"latent of {list(latent.shape)}", remedy=f"read are [{self.channels}, t, h, w]")
        if bad := int((~torch.isfinite(latent)).sum()):
            raise CinemeshError(
                f"{bad} of {latent.numel()} latent values are not finite and decode to no picture",
                remedy="the model that made them has diverged: sample from an earlier checkpoint",
            )
        (t, h, w), length, side = latent.shape[1:], self.temporal_stride, self.spatial_stride
        pixels = ((self.blocks(latent.float()) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        blocks = pixels.view(t, h, w, length, side, side, 3).permute(0, 3, 1, 4, 2, 5, 6)
        return blocks.reshape(t * length, h * side, w * side, 3)

    def pixels(self, frames: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3] -> pixels of their blocks in [-1, 1], float32 [t h w, values of a block]."""
        length, side = self.temporal_stride, self.spatial_stride
        whole = torch.cat([frames, frames[-1:].expand(-len(frames) % length, -1, -1, -1)])
        t, h, w = len(whole) // length, whole.shape[1] // side, whole.shape[2] // side
        blocks = whole.view(t, length, h, side, w, side, 3).permute(0, 2, 4, 1, 3, 5, 6)
        return blocks.reshape(t * h * w, -1).float() / 127.5 - 1.0

    def blocks(self, latent: Tensor) -> Tensor:
        """Latent float32 [C, t, h, w] -> its blocks' pixels, about [-1, 1], not rounded: [t h w, values of a block]."""
        return (latent.reshape(self.channels, -1).T * self.std + self.mean) @ self.basis


def _basis(length: int, side: int, coefficients: Sequence[Coefficient]) -> Tensor:
    """The kept basis vectors of blocks as rows, float32 [C, length * side * side * 3], (time, height, width, RGB)."""
    of_time, of_space = _cosines(length), _cosines(side)
    colours = torch.tensor(OPPONENT_AXES, dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    rows = [
        torch.einsum("t,h,w,c->thwc", of_time[t], of_space[h], of_space[w], colours[colour])
        for colour, (t, h, w), _, _ in coefficients
    ]
    return torch.stack(rows).flatten(1).float()


def _cosines(size: int) -> Tensor:
    """DCT-II: float64 [frequency, position], orthonormal."""
    index = torch.arange(size, dtype=torch.float64)
    angles = math.pi / size * (index + 0.5) * index[:, None]
    dct = math.sqrt(2 / size) * torch.cos(angles)
    dct[0] /= math.sqrt(2)
    return dct
