"""Buckets: the shapes of a run's windows. Every step takes samples of one bucket (see ``order``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from ..errors import CinemeshError
from ..model.buckets import Latent
from ..ranges import BATCH_RANGE, WEIGHT_RANGE, check_ranges, integers, reals
from .codec import LatentCodec
from .windows import ROUNDING_S, grid_frames

Frames = Annotated[int, integers(1, 10_000, "all frames of a window are in memory at once", "frames")]
Pixels = Annotated[int, integers(1, 8192, "no codec here encodes a larger frame at once", "pixels")]
Weight = Annotated[float, WEIGHT_RANGE]
OwnBatch = Annotated[int, BATCH_RANGE]
Fps = Annotated[int, integers(1, 1000, "no video has more", "frames/s")]
SceneSeconds = Annotated[float, reals(0, 600, "no window is as long", "s", above=True)]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")  # it stands in names of files
LEAST_SQUEEZED = 16  # frames/s of a scene that is squeezed whole into a bucket: Movie Gen, Table 2


@dataclass(frozen=True)
class Bucket:
    """A window shape in frames and pixels. Steps take windows of it in proportion to ``weight``.

    ``name``: of one of several buckets of a shape; None: the shape is the name.
    ``global_batch``: of a step of it; None: the data's. Windows play at ``fps`` frames/s; with ``squeeze_from_s``, a
    scene of that many seconds or more is one window, at its own rate: ``frames`` / duration, at least LEAST_SQUEEZED.
    """

    frames: Frames
    height: Pixels
    width: Pixels
    weight: Weight
    global_batch: OwnBatch | None = None
    fps: Fps = 24
    squeeze_from_s: SceneSeconds | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "data.buckets: ")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise CinemeshError(
                f"data.buckets: name {self.name!r}", remedy="a name is letters, digits, - and _, at most 41 of them"
            )
        if self.squeeze_from_s is not None and self.squeeze_from_s * LEAST_SQUEEZED > self.frames:
            raise CinemeshError(
                f"data.buckets: squeeze_from_s({self.squeeze_from_s:g} s) * {LEAST_SQUEEZED} frames/s > "
                f"frames({self.frames}) in {self}: no scene plays at {LEAST_SQUEEZED} frames/s or more",
                remedy=f"set squeeze_from_s to at most {self.frames / LEAST_SQUEEZED:g} s, or take more frames",
            )

    def __str__(self) -> str:
        return self.name or self.shape

    @property
    def shape(self) -> str:
        """``FRAMESxHEIGHTxWIDTH``."""
        return f"{self.frames}x{self.height}x{self.width}"

    def rate(self, seconds: Fraction) -> Fraction | None:
        """Frames/s of its windows of a scene of so many seconds, 0 of an image; None where it takes none of it."""
        if not seconds:
            return Fraction(self.fps) if self.frames == 1 and self.squeeze_from_s is None else None
        if self.squeeze_from_s is None:
            return Fraction(self.fps) if grid_frames(seconds, Fraction(self.fps)) >= self.frames else None
        fits = self.squeeze_from_s <= seconds + ROUNDING_S and LEAST_SQUEEZED * (seconds - ROUNDING_S) <= self.frames
        return self.frames / seconds if fits else None

    @property
    def timing(self) -> tuple[int, int, float | None]:
        """Its rule for time: buckets that differ in their shape alone have the same one."""
        return self.frames, self.fps, self.squeeze_from_s

    def cropped(self, aspect: Fraction) -> Fraction:
        """Of a frame so many times as wide as high, the part that its crop leaves out."""
        times = aspect * self.height / self.width
        return 1 - min(times, 1 / times)

    @property
    def needs(self) -> str:
        """Of a scene, for a message."""
        if self.squeeze_from_s is not None:
            return f"{self.squeeze_from_s:g} to {self.frames / LEAST_SQUEEZED:g} s"
        return f"{self.frames} frames at {self.fps} frames/s, {self.frames / self.fps:.3g} s"

    def latent(self, codec: LatentCodec) -> Latent:
        """(T, H, W) of a window's latent. Raises CinemeshError for pixels that the codec's stride does not divide."""
        stride = codec.spatial_stride
        for name, size in (("height", self.height), ("width", self.width)):
            if size % stride:
                raise CinemeshError(
                    f"data.buckets: {name}({size}) % {stride} = {size % stride} in {self}",
                    remedy=f"the codec needs a multiple of {stride}",
                )
        return codec.latent_frames(self.frames), self.height // stride, self.width // stride


@dataclass(frozen=True)
class BucketSettings:
    """A bucket as the recipe gives it; what it leaves out is the data's own ``frames``, ``size`` or ``fps``."""

    frames: Annotated[Frames | None, "length of a window; default: the data's"] = None
    height: Annotated[Pixels | None, "of a window; default: the data's size"] = None
    width: Annotated[Pixels | None, "of a window; default: the data's size"] = None
    weight: Annotated[Weight, "its part of the steps, over the sum of all weights"] = 1.0
    global_batch: Annotated[
        OwnBatch | None, "samples of a step of it; default: the data's. A short window takes more to fill the devices"
    ] = None
    fps: Annotated[Fps | None, "frames/s of its windows; default: the data's"] = None
    squeeze_from_s: Annotated[
        SceneSeconds | None,
        "instead of a fixed rate: scenes from this length to frames / 16 s are taken whole, at frames / duration",
    ] = None
    name: Annotated[str | None, "in reports and files; default: FRAMESxHEIGHTxWIDTH, which two cannot share"] = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.squeeze_from_s is not None:
            raise CinemeshError(
                f"data.buckets: fps({self.fps}) and squeeze_from_s({self.squeeze_from_s:g}) in one bucket, and it has "
                "one rule for its rate",
                remedy="leave one of them out",
            )

    def whole(self, frames: int, size: int, fps: int) -> Bucket:
        """With what it left out. Raises CinemeshError for sizes or a weight that are not positive."""
        return Bucket(
            frames if self.frames is None else self.frames,
            size if self.height is None else self.height,
            size if self.width is None else self.width,
            self.weight,
            self.global_batch,
            fps if self.fps is None else self.fps,
            self.squeeze_from_s,
            self.name,
        )


def latents_of(buckets: Sequence[Bucket], codec: LatentCodec) -> list[Latent]:
    """(T, H, W) of each bucket's latents. Raises CinemeshError for one that the codec cannot make."""
    return [bucket.latent(codec) for bucket in buckets]


def check_names(buckets: Sequence[Bucket]) -> None:
    """Raises CinemeshError for two buckets of one name."""
    names = [str(bucket) for bucket in buckets]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise CinemeshError(
            f"data.buckets: {names.count(twice[0])} are called {twice[0]}",
            remedy="give buckets of one shape a name each, as {name: short, ...}, or leave all but one out",
        )
