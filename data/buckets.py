"""Buckets: the shapes of a run's windows. Every step takes samples of one bucket (see ``order``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ..errors import CinemeshError
from ..model.buckets import Latent, latent_text
from ..model.codec import LatentCodec
from ..ranges import BATCH_RANGE, WEIGHT_RANGE, check_ranges, integers

Frames = Annotated[int, integers(1, 10_000, "all frames of a window are in memory at once", "frames")]
Pixels = Annotated[int, integers(1, 8192, "no codec here encodes a larger frame at once", "pixels")]
Weight = Annotated[float, WEIGHT_RANGE]
OwnBatch = Annotated[int, BATCH_RANGE]


@dataclass(frozen=True)
class Bucket:
    """A window shape in frames and pixels. Steps take windows of it in proportion to ``weight``.

    ``global_batch``: of a step of it; None: the data's.
    """

    frames: Frames
    height: Pixels
    width: Pixels
    weight: Weight
    global_batch: OwnBatch | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "data.buckets: ")

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    def latent(self, codec: LatentCodec) -> Latent:
        """(T, H, W) of a window's latent. Raises CinemeshError for pixels that the codec's stride does not divide."""
        stride = codec.spatial_stride
        for name, size in (("height", self.height), ("width", self.width)):
            if size % stride:
                raise CinemeshError(
                    f"data.buckets: {name}({size}) % {stride} = {size % stride} in {self}",
                    remedy=f"the codec needs a multiple of {stride}",
                )
        return math.ceil(self.frames / codec.temporal_stride), self.height // stride, self.width // stride


@dataclass(frozen=True)
class BucketSettings:
    """A bucket as the recipe gives it; what it leaves out is the data's own ``frames`` or ``size``."""

    frames: Annotated[Frames | None, "length of a window; default: the data's"] = None
    height: Annotated[Pixels | None, "of a window; default: the data's size"] = None
    width: Annotated[Pixels | None, "of a window; default: the data's size"] = None
    weight: Annotated[Weight, "its part of the steps, over the sum of all weights"] = 1.0
    global_batch: Annotated[
        OwnBatch | None, "samples of a step of it; default: the data's. A short window takes more to fill the devices"
    ] = None

    def whole(self, frames: int, size: int) -> Bucket:
        """With what it left out. Raises CinemeshError for sizes or a weight that are not positive."""
        return Bucket(
            frames if self.frames is None else self.frames,
            size if self.height is None else self.height,
            size if self.width is None else self.width,
            self.weight,
            self.global_batch,
        )


def latents_of(buckets: Sequence[Bucket], codec: LatentCodec) -> list[Latent]:
    """(T, H, W) of each bucket's latents. Raises CinemeshError for one that the codec cannot make, or makes twice."""
    made: dict[Latent, Bucket] = {}
    for bucket in buckets:
        latent = bucket.latent(codec)
        if latent in made:
            raise CinemeshError(
                f"data.buckets: {made[latent]} and {bucket} both make latents of {latent_text(latent)}, and a latent "
                "has one captured step",
                remedy="leave one of them out and give its weight to the other",
            )
        made[latent] = bucket
    return list(made)
