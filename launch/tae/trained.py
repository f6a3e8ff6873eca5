"""What training is for: how well the running average gives back held-out windows, and the codec that it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...data.cache.samples import Cache, Samples
from ...errors import CinemeshError
from ...evaluation.reconstruction import WINDOW_PX, Reconstruction, reconstruct
from ...model.tae import files
from ...model.tae.autoencoder import Autoencoder
from ...model.tae.codec import TAECodec, latent_statistics
from ...model.tae.tiles import Tiling
from ..training.differences import RECIPE, recorded
from ..written import command, wrote
from .networks import Networks
from .recipe import TAERecipe

FOLDER = "autoencoder"  # below logging.directory: the codec's directory


def reconstructed(networks: Networks, recipe: TAERecipe, cache: Cache) -> Reconstruction | None:
    """Of the first bucket of several frames that has held-out windows, by the average of the weights; None: none.

    An autoencoder of images has any bucket. In bfloat16 where it is trained so.
    """
    for bucket, windows in zip(recipe.data.shapes, cache.buckets, strict=True):
        still = networks.average.config.temporal_stride == 1  # of images, which may be all that it is trained on
        if (still or bucket.frames > 1) and len(windows.validation) and min(bucket.height, bucket.width) >= WINDOW_PX:
            net = networks.average
            bare = torch.zeros(net.config.channels), torch.ones(net.config.channels)
            trained = files.Trained(net, *bare, Tiling.of(net.config.temporal_stride), "")
            codec = TAECodec(trained, networks.device, "bfloat16" if recipe.dtype == "bfloat16" else "float32")
            return reconstruct(codec, clips_of(windows.validation))
    return None


def write_trained(networks: Networks, recipe: TAERecipe, cache: Cache) -> None:
    """Write the average of the weights, with the statistics of its latents over training windows."""
    directory, average = recipe.logging.directory / FOLDER, networks.average
    tiling = Tiling.of(average.config.temporal_stride)
    mean, std = latent_statistics(average, tiling, training_windows(recipe, cache))
    images = (mean, std) if tiling.stride == 1 else _of_images(average, tiling, recipe, cache)
    about: dict[str, Any] = {RECIPE: recorded(recipe), "steps": networks.steps}
    if (found := reconstructed(networks, recipe, cache)) is not None:
        about["held_out"] = asdict(found)
    files.write(directory, average, mean, std, about, images)
    wrote(directory, command("codec", "eval", codec=directory))


def _of_images(average: Autoencoder, tiling: Tiling, recipe: TAERecipe, cache: Cache) -> tuple[Tensor, Tensor] | None:
    """Of the middle frame of every such window, alone; None where a channel is the same in all of them."""
    try:
        middle = (frames[len(frames) // 2 :][:1] for frames in training_windows(recipe, cache))
        return latent_statistics(average, tiling, middle)
    except CinemeshError:
        return None


def training_windows(recipe: TAERecipe, cache: Cache) -> Iterator[Tensor]:
    """Of every bucket, evenly, up to what the recipe says together."""
    each = max(1, recipe.statistics_from // len(cache.buckets))
    for windows in cache.buckets:
        every = -(-len(windows.train) // each)
        yield from (frames for _, frames in clips_of(windows.train[::every]))


def clips_of(samples: Samples) -> Iterator[tuple[str, Tensor]]:
    """Scene and frames uint8 [T, H, W, 3] of windows of pixels."""
    for index in range(len(samples)):
        sample = samples[index]
        yield sample.scene, sample.latent.permute(1, 2, 3, 0).contiguous()
