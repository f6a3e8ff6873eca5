"""Tiles: a clip of any length in constant memory, along time alone. Movie Gen 3.1.1.

Encoded are 32 raw frames at a time, without overlap; decoded are 32, of which 16 overlap the tile before. Over the N
frames of an overlap the tiles are blended linearly. The paper prints x^j = w^j x_i^j + (1 - w^j) x_{i+1}^j with
w^j = j / N: taken literally the weight of the EARLIER tile i rises, and the picture jumps at both ends. Here w is the
later tile's, at the middle of frame j: (j + 1/2) / N.

    tile 0   0 1 2 3                latent frames, of 8 raw ones each
    tile 1       2 3 4 5            decoded: 2 overlap
    tile 2           4 5 6          the last is as short as it must be, 3 at least after another
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CinemeshError
from .tile_shapes import OVERLAP_FRAMES, TILE_FRAMES


@dataclass(frozen=True)
class Tiling:
    """How clips are cut: latent frames of a tile, and of a decoded one how many the tile before has, too."""

    latents: int
    overlap: int
    stride: int  # raw frames of a latent one

    @classmethod
    def of(cls, stride: int) -> Tiling:
        """The paper's, for latents of ``stride`` frames. Frames that know nothing of one another need no overlap.

        Raises CinemeshError for a stride that does not divide it.
        """
        if OVERLAP_FRAMES % stride:
            raise CinemeshError(
                f"tiles of {TILE_FRAMES} frames, of which {OVERLAP_FRAMES} overlap, of latents of {stride} frames: "
                f"{OVERLAP_FRAMES} % {stride} = {OVERLAP_FRAMES % stride}",
                remedy="take fewer levels",
            )
        return cls(TILE_FRAMES // stride, OVERLAP_FRAMES // stride if stride > 1 else 0, stride)

    def encoded(self, frames: int) -> list[tuple[range, int]]:
        """Of a clip: raw frames of every tile, and how many of its latent frames, the last ones, are kept.

        The last tile begins earlier where that makes it whole: it is encoded with what is before it.
        """
        latents = -(-frames // self.stride)
        tiles: list[tuple[range, int]] = []
        for first in range(0, latents, self.latents):
            last = min(first + self.latents, latents)
            start = max(0, last - self.latents)
            tiles.append((range(start * self.stride, min(last * self.stride, frames)), last - first))
        return tiles

    def decoded(self, latents: int) -> list[range]:
        """Of a latent: latent frames of every tile."""
        step = self.latents - self.overlap
        starts = range(0, max(1, latents - self.overlap), step)
        return [range(start, min(start + self.latents, latents)) for start in starts]

    def joined(self, tiles: Iterable[Tensor], latents: int) -> Iterator[Tensor]:
        """Decoded tiles [n, ...], in order, to the frames of the clip, in pieces. One tile is held at a time."""
        shared = self.overlap * self.stride
        held: Tensor | None = None  # the end of the tile before, which the next one has, too
        for place, tile in zip(self.decoded(latents), tiles, strict=True):
            if held is not None:
                tile = torch.cat([blended(held, tile[: len(held)]), tile[len(held) :]])
            more = place.stop < latents
            held = tile[len(tile) - shared :] if more else None
            yield tile[: len(tile) - shared] if more else tile


def later_weights(frames: int) -> Tensor:
    """Of the later tile, at every frame of an overlap: rises linearly from nearly 0 to nearly 1."""
    return (torch.arange(frames) + 0.5) / frames


def blended(earlier: Tensor, later: Tensor) -> Tensor:
    """Of the N frames [N, ...] that two tiles have."""
    weight = later_weights(len(later)).to(later).view(-1, *[1] * (later.dim() - 1))
    return earlier + weight * (later - earlier)
