"""The low-resolution clip that a spatial upsampler is shown: what it was degraded to, and how it is encoded again.

Movie Gen 3.1.5: a clip is enlarged bilinearly in pixels, encoded frame by frame, and its latent concatenated to the
noisy one. In training the small clip is made of the large one, by degradation of second order (``degrade``) or, at
times, by an autoencoder's round trip, whose faults are those of the clips that a video model will hand on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CinemeshError
from ..model.config import LOW_RESOLUTION, LatentCondition
from ..ranges import SEED_RANGE, check_ranges, integers, reals
from .codec import LatentCodec
from .degrade import ClipDraws, degraded

FORMAT = 1  # raise it when another low-resolution clip is made of the same settings
Scale = Annotated[int, integers(2, 8, "1 is no smaller, and of less than an eighth little is left", "times")]
Strength = Annotated[float, reals(0, 1, "1 is Real-ESRGAN's published ranges")]
TripShare = Annotated[float, reals(0, 1, "it is a part of a whole", "of the clips")]
Seed = Annotated[int, SEED_RANGE]


@dataclass(frozen=True)
class LowResolutionSettings:
    """The clip ``scale`` times smaller that a model is shown beside noise, a spatial upsampler (Movie Gen 3.1.5)."""

    scale: Annotated[Scale, "height and width of a window over those of what it is made of"] = 2
    strength: Annotated[Strength, "of blur, resize, noise, JPEG and H.264; at 0 hardly anything is lost"] = 1.0
    seed: Annotated[Seed, "of what is drawn of each window, by its clip and first frame"] = 0
    round_trip: Annotated[
        str | None, "an autoencoder, a directory or a kind of codec, whose faults some clips have in their place"
    ] = None
    round_trip_share: Annotated[TripShare, "of the clips whose faults are that codec's, where there is one"] = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, "data.low_resolution.")

    def check(self, height: int, width: int, bucket: object) -> None:
        """Raises CinemeshError for a window that is no multiple of the scale."""
        if height % self.scale or width % self.scale:
            raise CinemeshError(
                f"data.low_resolution: {bucket} is {self.scale} times as large as no clip: {height} % {self.scale} = "
                f"{height % self.scale}, {width} % {self.scale} = {width % self.scale}",
                remedy="change the bucket or the scale",
            )


class LowResolution:
    """Makes them. ``trip``: the codec of the settings' ``round_trip``."""

    def __init__(self, settings: LowResolutionSettings, trip: LatentCodec | None) -> None:
        self.settings, self._trip = settings, trip

    @property
    def facts(self) -> list[object]:
        """What decides the small clip of a window."""
        s = self.settings
        trip = None if self._trip is None else [self._trip.fingerprint, s.round_trip_share]
        return [FORMAT, s.scale, s.strength, s.seed, trip]

    def condition(self, codec: LatentCodec) -> LatentCondition:
        """What a model takes."""
        return LatentCondition(LOW_RESOLUTION, codec.channels)

    def small(self, frames: Tensor, clip: str, first_frame: int) -> Tensor:
        """A window's frames uint8 [T, H, W, 3] -> uint8 [T, H / scale, W / scale, 3], as seed, clip and frame say."""
        s, draws = self.settings, ClipDraws(self.settings.seed, clip, first_frame)
        height, width = frames.shape[1] // s.scale, frames.shape[2] // s.scale
        if self._trip is not None and draws.happens(s.round_trip_share):
            return there_and_back(self._trip, reduced(frames, height, width))
        return degraded(frames, height, width, s.strength, draws)

    def latent(self, codec: LatentCodec, frames: Tensor, clip: str, first_frame: int) -> Tensor:
        """What the model is shown of a window: the latent of its small clip, enlarged."""
        return codec.encode(enlarged(self.small(frames, clip, first_frame), frames.shape[1], frames.shape[2]))


def enlarged(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames uint8 [T, h, w, 3], bilinearly in pixels, to uint8 [T, height, width, 3]."""
    made = F.interpolate(frames.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear", align_corners=False)
    return made.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def reduced(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames uint8 [T, H, W, 3], each pixel the mean of what it covers, to uint8 [T, height, width, 3]."""
    made = F.interpolate(frames.permute(0, 3, 1, 2).float(), (height, width), mode="area")
    return made.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def padded(frames: Tensor, multiple: int) -> Tensor:
    """Frames uint8 [T, H, W, 3] with their last row and column repeated until both sizes are multiples."""
    below, right = -frames.shape[1] % multiple, -frames.shape[2] % multiple
    if not below and not right:
        return frames
    planes = F.pad(frames.permute(0, 3, 1, 2).float(), [0, right, 0, below], mode="replicate")
    return planes.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def there_and_back(codec: LatentCodec, frames: Tensor) -> Tensor:
    """Frames uint8 [T, H, W, 3], encoded and decoded; of any size."""
    made = codec.decode(codec.encode(padded(frames, codec.spatial_stride)))
    return made[: len(frames), : frames.shape[1], : frames.shape[2]].contiguous()
