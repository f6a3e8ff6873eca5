"""The batches of an autoencoder's training: windows, cropped and mirrored as seed, step and sample say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.batches import BatchHistory
from ...data.cache.drawn import Drawn, RunOrder
from ...data.cache.history import Draws, History
from ...data.cache.samples import Cache
from ...data.pixel_codec import unencoded
from ...kernels.philox import normal, uniform
from ..cluster.processes import Joined
from ..training.latent_cache import built_version
from .recipe import TAERecipe

# Philox purposes, disjoint from those of kernels.philox.Purpose and data/order.py
CROP_PURPOSE = 10  # where a crop begins, and whether it is mirrored: elements 0, 1 and 2
POSTERIOR_PURPOSE = 11  # noise of a latent


@dataclass(frozen=True)
class PixelBatch:
    """This rank's share of a step: pixels [b, T, 3, H, W] in [-1, 1]; ``ids`` of samples, ``places`` in the batch."""

    step: int
    bucket: int
    pixels: Tensor
    ids: Tensor
    places: Tensor

    def noise(self, seed: int, latent: torch.Size) -> Tensor:
        """Standard normals of its posterior [b, t, C, h, w], float64; element: in C order of a sample's latent."""
        element = torch.arange(latent[1:].numel())
        step = torch.tensor(self.step)
        ids, places = self.ids[:, None], self.places[:, None]
        return normal(seed, POSTERIOR_PURPOSE, step, ids, element, places).view(latent)


def open_pixels(recipe: TAERecipe, place: Joined) -> Cache:
    """The cache of windows, built where it is missing, by all ranks."""
    folder = str(recipe.data.cache)
    return Cache.open(folder, built_version(folder, recipe.data, unencoded(), place))


class PixelFeed:
    """Of one rank of ``ranks``."""

    def __init__(self, recipe: TAERecipe, cache: Cache, rank: int, ranks: int) -> None:
        self.recipe, self.rank, self.ranks = recipe, rank, ranks
        data, weights = recipe.data, tuple(bucket.weight for bucket in recipe.data.shapes)
        batches = BatchHistory.always(tuple(data.global_batches))
        order = RunOrder(recipe.seed, recipe.schedule.steps, weights, batches)
        self.drawn = Drawn(order, History(str(data.cache), (Draws(0, cache),)))

    def take(self, step: int) -> PixelBatch:
        """Raises CinemeshError for a sample that cannot be read."""
        bucket, train, indices = self.drawn.bucket[step], self.drawn.at(step).train, self.drawn.indices(step)
        share = len(indices) // self.ranks
        places = torch.arange(self.rank * share, (self.rank + 1) * share)
        samples = [train[indices[place]] for place in places.tolist()]
        ids = torch.tensor([sample.id for sample in samples])
        rows = [
            self._cut(sample.latent, draws)
            for sample, draws in zip(samples, self._draws(step, ids, places), strict=True)
        ]
        return PixelBatch(step, bucket, torch.stack(rows).float() / 127.5 - 1.0, ids, places)

    def _draws(self, step: int, ids: Tensor, places: Tensor) -> list[list[float]]:
        """Three of every sample."""
        element = torch.arange(3)
        drawn = uniform(self.recipe.seed, CROP_PURPOSE, torch.tensor(step), ids[:, None], element, places[:, None])
        return drawn.tolist()

    def _cut(self, window: Tensor, draws: list[float]) -> Tensor:
        """uint8 [3, T, H, W] -> [T, 3, h, w]."""
        data = self.recipe.data
        for dim, draw in zip((2, 3), draws, strict=False):
            size = window.shape[dim]
            length = min(size, data.crop or size)
            window = window.narrow(dim, int(draw * (size - length + 1)), length)
        if data.mirror and draws[2] < 0.5:
            window = window.flip(3)
        return window.transpose(0, 1)
