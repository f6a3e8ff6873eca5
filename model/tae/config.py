"""Shapes of the temporal autoencoder and its presets (torch-free).

Movie Gen 3.1.1: an image autoencoder of the latent diffusion model (Rombach et al. 2022), inflated over time; it
compresses 8x in time, height and width into 16 channels. The paper gives no widths: those of ``movie-gen`` are LDM's
(its f8 models: 128 channels, multiplied by 1, 2, 4, 4, two residual blocks a level).

    B clips   T frames   H, W pixels   C channels   t, h, w latent dims   t = ceil(T / 8), h = H / 8, w = W / 8
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from ...errors import CinemeshError, did_you_mean
from ...ranges import check_ranges, integers

Time = Literal["none", "1d", "3d"]
Body = Literal["pyramid", "grid"]

GRID_STRIDE = 8  # of the body ``grid``: that of the fixed codec whose map it begins with
COLOURS = 3
TAPS = 3  # of a convolution over time: a frame and its neighbours

Channels = Annotated[int, integers(1, 1024, "no autoencoder has more", "channels")]
Width = Annotated[int, integers(1, 8192, "no autoencoder is wider", "channels")]
Factor = Annotated[int, integers(1, 64, "no level is wider", "times the width")]
BlockDepth = Annotated[int, integers(1, 64, "no level is deeper", "residual blocks")]


@dataclass(frozen=True, kw_only=True)
class TAEConfig:
    """One autoencoder.

    ``body`` pyramid: the paper's, levels of ``width`` times each of ``multipliers``, halved from one to the next; grid:
    a linear map of 8x8x8 blocks that begins as the fixed codec's, with residual nets of ``width`` on their grid added.
    ``time``: none, an image autoencoder that takes frame by frame; 1d, 2.5D: a convolution over time after each
    spatial one and attention over time after the spatial (3.1.1); 3d: both at once (3.6.3).
    """

    name: str
    channels: Channels = 16  # 3.1.1
    body: Body = "pyramid"
    time: Time = "1d"
    width: Width = 128
    multipliers: tuple[Factor, ...] = (1, 2, 4, 4)
    blocks: BlockDepth = 2
    groups: Width = 32  # of GroupNorm, in one frame: a norm over time would break tiles, and clips of one frame

    def __post_init__(self) -> None:
        check_ranges(self, f"autoencoder {self.name}: ")
        for factor in self.multipliers:
            if self.width * factor % self.groups:
                raise CinemeshError(
                    f"autoencoder {self.name}: width({self.width}) * {factor} % groups({self.groups}) = "
                    f"{self.width * factor % self.groups}",
                    remedy="each group of a norm has as many channels: change width or groups",
                )
        if not self.multipliers:
            raise CinemeshError(f"autoencoder {self.name}: multipliers is empty", remedy="name one for each level")
        if self.body == "grid" and (self.time != "1d" or self.multipliers != (1,)):
            raise CinemeshError(
                f"autoencoder {self.name}: body grid with time {self.time} and multipliers {list(self.multipliers)}",
                remedy="its blocks are of 8 frames and its grid has one level: time 1d, multipliers [1]",
            )

    @property
    def spatial_stride(self) -> int:
        return GRID_STRIDE if self.body == "grid" else 1 << len(self.multipliers) - 1

    @property
    def temporal_stride(self) -> int:
        """The temporal strides sit where the spatial ones do."""
        return 1 if self.time == "none" else self.spatial_stride

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, the finest first."""
        return tuple(self.width * factor for factor in self.multipliers)

    def latent_frames(self, frames: int) -> int:
        """T -> t."""
        return math.ceil(frames / self.temporal_stride)

    def latent(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of a clip. Raises CinemeshError for sizes that the stride does not divide."""
        stride = self.spatial_stride
        if frames < 1 or height < 1 or width < 1 or height % stride or width % stride:
            raise CinemeshError(
                f"{frames} frames of {height} x {width} pixels: {height} % {stride} = {height % stride}, "
                f"{width} % {stride} = {width % stride}",
                remedy=f"a clip has a frame at least and both sizes are positive multiples of {stride}: resize or crop",
            )
        return self.latent_frames(frames), height // stride, width // stride


TAE_PRESETS = (
    # The paper's, as far as it tells; for 1024 px, at which its outlier penalty of 1e5 fits (``losses``).
    TAEConfig(name="movie-gen"),
    TAEConfig(name="movie-gen-3d", time="3d", channels=8, multipliers=(1, 2, 4)),  # 3.6.3: 4x, 8 channels
    TAEConfig(name="movie-gen-2.5d", channels=8, multipliers=(1, 2, 4)),  # its counterpart, likewise
    TAEConfig(name="frame-wise", time="none", channels=8),  # 3.6.3: the baseline, an image autoencoder
    # Trained here: the paper's form, and what begins as the fixed codec.
    TAEConfig(name="small", width=16, blocks=1, groups=8, multipliers=(1, 1, 2, 4)),
    TAEConfig(name="grid", body="grid", width=256, multipliers=(1,)),
    TAEConfig(name="tiny", channels=4, width=8, blocks=1, groups=4, multipliers=(1, 1, 2, 2)),
)


def tae_preset(name: str) -> TAEConfig:
    """Raises CinemeshError for a name that is none."""
    known = {config.name: config for config in TAE_PRESETS}
    if name not in known:
        raise CinemeshError(f"there is no autoencoder {name!r}", remedy=did_you_mean(name, known))
    return known[name]


def image_half(config: TAEConfig) -> TAEConfig:
    """The image autoencoder that inflates to this one. Raises CinemeshError for a body that has none."""
    if config.body != "pyramid":
        raise CinemeshError(
            f"autoencoder {config.name}: body {config.body} is inflated from none", remedy="take a pyramid"
        )
    return replace(config, time="none")
