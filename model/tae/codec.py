"""A trained temporal autoencoder as a codec (``LatentCodec``): tile by tile, on a CPU or a GPU.

Encoded is the posterior's mean, standardised by each channel's mean and std over the training clips, which lie with
the weights. Tiles (``tiles``) are part of what latents are: with others, those at borders would differ.

The image half of an autoencoder takes every frame by itself, as a clip of one: what is strided or convolved over time
then sees that frame alone, and a latent is decoded to equal frames, of which one is taken. Its temporal stride is 1,
and its latents are standardised by the statistics of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...errors import CinemeshError
from ...parallel.runtime.comm import Communicator
from .autoencoder import Autoencoder
from .config import TAEConfig
from .files import Trained, read_trained
from .spread import each_tile
from .tiles import Tiling

Precision = Literal["float32", "bfloat16"]


def to_pixels(frames: Tensor) -> Tensor:
    """Frames uint8 [T, H, W, 3] -> pixels [T, 3, H, W] in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_frames(pixels: Tensor) -> Tensor:
    """Pixels [T, 3, H, W] -> frames uint8 [T, H, W, 3]."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class TAECodec:
    """See ``LatentCodec``. With a communicator, the tiles of a clip are spread over its ranks: all then call alike.

    ``device``: a GPU without a number is that which the process has taken when a clip comes.
    """

    errors = "A network decodes latents: an error in one smears what lies about it."

    def __init__(
        self, trained: Trained, device: str = "cpu", dtype: Precision = "float32", *, images: bool = False
    ) -> None:
        """``dtype``: of the products and convolutions; norms and the result are float32. ``images``: its image half.

        Raises CinemeshError for an image half of an autoencoder whose images were not measured.
        """
        self.config: TAEConfig = trained.net.config
        self.alone = images and self.config.temporal_stride > 1  # of itself, an image autoencoder is its image half
        self._net, self.mean, self.std, self.tiling = trained.net, trained.mean, trained.std, trained.tiling
        self.channels, self.spatial_stride = self.config.channels, self.config.spatial_stride
        self.temporal_stride = self.config.temporal_stride
        if self.alone:
            if trained.images is None:
                raise CinemeshError(
                    f"codec.images: autoencoder {self.config.name} knows no mean and std of its images' latents, "
                    "because a channel is the same in all of them or it was trained before they were measured",
                    remedy="train it on images too, or an autoencoder of images: model.time: none",
                )
            (self.mean, self.std), self.tiling, self.temporal_stride = trained.images, Tiling.of(1), 1
        self.device, self.dtype, self.weights_dtype = torch.device(device), dtype, next(trained.net.parameters()).dtype
        made_by = repr((trained.digest, self.mean.tolist(), self.std.tolist(), self.tiling, dtype))
        self.fingerprint = f"tae-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}"

    @classmethod
    def of(
        cls, path: Path, device: Literal["auto", "cpu", "cuda"], dtype: Precision, where: str, *, images: bool = False
    ) -> TAECodec:
        """From a directory. Raises CinemeshError for one that holds none, and where there is no such device."""
        there = torch.cuda.is_available()
        if device == "cuda" and not there:
            raise CinemeshError(f"{where}: device is cuda, and torch sees no GPU here", remedy="set it to cpu or auto")
        return cls(read_trained(path, where), "cuda" if there and device != "cpu" else "cpu", dtype, images=images)

    @cached_property
    def net(self) -> Autoencoder:
        """On its device from its first use on: a rank reads its recipe, and forks, before it takes its GPU."""
        net = self._net.to(self.device)
        self.device = next(net.parameters()).device  # with its number
        return net

    def latent_frames(self, frames: int) -> int:
        return frames if self.alone else self.config.latent_frames(frames)

    @torch.inference_mode()
    def encode(self, frames: Tensor, communicator: Communicator | None = None) -> Tensor:
        """See ``LatentCodec.encode``."""
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
            raise CinemeshError(
                f"frames are {frames.dtype} {list(frames.shape)}", remedy="a clip is uint8 [T, H, W, 3]"
            )
        self.config.latent(*frames.shape[:3])
        net = self.net

        def one(tile: tuple[range, int]) -> Tensor:
            span, kept = tile
            pixels = to_pixels(frames[span.start : span.stop].to(self.device)).to(self.weights_dtype)
            with self._autocast():
                if self.alone:
                    return net.encode(pixels[-kept:, None]).mean[:, 0].float()
                return net.encode(pixels[None]).mean[0, -kept:].float()

        tiles = self.tiling.encoded(len(frames))
        parts = [part.cpu() for part in each_tile(tiles, one, lambda tile: tile[1], communicator)]
        latent = torch.cat(parts).transpose(0, 1)
        return ((latent - _wide(self.mean)) / _wide(self.std)).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """See ``LatentCodec.decode``."""
        return torch.cat(list(self.decoded(latent)))

    @torch.inference_mode()
    def decoded(self, latent: Tensor, communicator: Communicator | None = None) -> Iterator[Tensor]:
        """As ``decode``, in pieces of the clip: of any length in constant memory, whatever becomes of the pieces.

        Raises CinemeshError for a wrong channel count and for values that are not finite.
        """
        if latent.dim() != 4 or latent.shape[0] != self.channels or not latent.numel():
            raise CinemeshError(f"latent of {list(latent.shape)}", remedy=f"read are [{self.channels}, t, h, w]")
        if bad := int((~torch.isfinite(latent)).sum()):
            raise CinemeshError(
                f"{bad} of {latent.numel()} latent values are not finite and decode to no picture",
                remedy="the model that made them has diverged: sample from an earlier checkpoint",
            )
        net = self.net

        def one(tile: range) -> Tensor:
            part = latent[:, tile.start : tile.stop].float() * _wide(self.std) + _wide(self.mean)
            latents = part.transpose(0, 1).to(self.device, self.weights_dtype)
            with self._autocast():
                if self.alone:
                    return net.decode(latents[:, None])[:, 0].float()
                return net.decode(latents[None])[0].float()

        length, stride = latent.shape[1], self.temporal_stride
        tiles = each_tile(self.tiling.decoded(length), one, lambda tile: len(tile) * stride, communicator)
        for pixels in self.tiling.joined((tile.cpu() for tile in tiles), length):
            yield to_frames(pixels)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def _wide(of_channels: Tensor) -> Tensor:
    return of_channels.view(-1, 1, 1, 1)


@torch.no_grad()
def latent_statistics(net: Autoencoder, tiling: Tiling, clips: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel, float32 [C], over ``clips``: frames uint8 [T, H, W, 3], at least one.

    Raises CinemeshError where a channel never changes: nothing can be divided by its std.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    parameter = next(net.parameters())
    for frames in clips:
        for span, kept in tiling.encoded(len(frames)):
            pixels = to_pixels(frames[span.start : span.stop].to(parameter.device)).to(parameter.dtype)
            values = net.encode(pixels[None]).mean[0, -kept:].double().cpu()
            total, squares = total + values.sum((0, 2, 3)), squares + values.square().sum((0, 2, 3))
            count += values.numel() // values.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if not bool((std > 0).all()):
        still = [index for index, value in enumerate(std.tolist()) if not value > 0]
        raise CinemeshError(
            f"latent channels {still} are the same everywhere in the training clips, or not finite",
            remedy="train on more clips, or for longer",
        )
    return mean.float(), std.float()
