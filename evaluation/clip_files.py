"""The files that people compare: found by the name of their prompt, and what a player shows of them (torch-free).

Both sides of a pair have one size, number of frames and rate, so that no side is known by them. Files that differ are
refused, or brought to one form (``fit``): scaled to cover the smaller height and width of the two and cropped around
the centre; of videos, at the lower rate the frame that is shown at each moment, cut to the shorter duration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import CinemeshError, in_a_line
from ..files import atomic_file
from .axes import Media

MEDIA_OF_SUFFIX = {
    ".mp4": Media.VIDEO,
    ".png": Media.IMAGE,
    ".jpg": Media.IMAGE,
    ".jpeg": Media.IMAGE,
    ".webp": Media.IMAGE,
}
NAMED = 3  # of many files, in a message
DAMAGED = "it is damaged or no {media}: replace it"


@dataclass(frozen=True)
class Form:
    """What a player shows of a file. An image is one frame, at no rate."""

    width: int
    height: int
    frames: int = 1
    rate: Fraction = Fraction(0)

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}"
        return f"{size}, {self.frames} frames at {float(self.rate):g} frames/s" if self.rate else size


def find_files(folder: Path, names: Iterable[str]) -> tuple[Media, dict[str, Path]]:
    """The one file of each name, without its suffix, and whether all are videos or all images.

    Raises CinemeshError for a folder that cannot be read, for names that have none or several, and for both media.
    """
    if not folder.is_dir():
        raise CinemeshError(f"{folder} is no folder", remedy="name the folder of a system's clips or images")
    found: dict[str, list[Path]] = {name: [] for name in names}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in MEDIA_OF_SUFFIX and path.stem in found and path.is_file():
            found[path.stem].append(path)
    if lacking := [name for name, paths in found.items() if not paths]:
        raise CinemeshError(
            f"{folder} has no file for {len(lacking)} of {len(found)} prompts: {_some(lacking)}",
            remedy=f"a file is called after its prompt's name: {lacking[0]}.mp4; add them, or take the prompts out",
        )
    for name, paths in found.items():
        if len(paths) > 1:
            raise CinemeshError(
                f"{folder} has {len(paths)} files for the prompt {name}: {_some([path.name for path in paths])}",
                remedy="keep one; best-of-n picks are marked with --best-of",
            )
    files = {name: paths[0] for name, paths in found.items()}
    kinds = {media_of(path) for path in files.values()}
    if len(kinds) > 1:
        raise CinemeshError(f"{folder} has videos and images", remedy="compare each kind by itself")
    return kinds.pop(), files


def media_of(path: Path) -> Media:
    """By its suffix."""
    return MEDIA_OF_SUFFIX[path.suffix.lower()]


def form_of(path: Path) -> Form:
    """Of a video or image. Raises CinemeshError where it is neither."""
    try:
        if media_of(path) is Media.IMAGE:
            with Image.open(path) as image:
                return Form(*ImageOps.exif_transpose(image).size)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            return Form(stream.width, stream.height, frames, stream.average_rate or Fraction(0))
    except (FFmpegError, OSError, IndexError, UnidentifiedImageError) as error:  # IndexError: no video stream
        raise CinemeshError(
            f"cannot open {path}: {in_a_line(error)}", remedy=DAMAGED.format(media=media_of(path))
        ) from error


def common_form(first: Form, second: Form) -> Form:
    """What ``fit`` brings both files to. Height and width are even, as videos have them."""
    rate = min(first.rate, second.rate)
    width, height = (min(sides) // 2 * 2 for sides in ((first.width, second.width), (first.height, second.height)))
    if not rate:
        return Form(width, height)
    duration_s = min(first.frames / first.rate, second.frames / second.rate)
    return Form(width, height, max(1, int(duration_s * rate)), rate)


def fit(source: Path, target: Path, form: Form) -> None:
    """Write the clip or image of ``source`` in that form. Raises CinemeshError where it cannot be read or written."""
    if media_of(source) is Media.IMAGE:
        with atomic_file(target) as part, Image.open(source) as image:
            whole = ImageOps.exif_transpose(image).convert("RGB")
            ImageOps.fit(whole, (form.width, form.height), Image.Resampling.LANCZOS).save(part, format="PNG")
        return
    from ..data.clips import write_mp4  # torch loads with it, and only here
    from ..data.video import frame_rate, read_frames

    frames, rate = read_frames(source, form.height, form.width), frame_rate(source)
    shown = [min(int(n / form.rate * rate), len(frames) - 1) for n in range(form.frames)]
    write_mp4(target, frames[shown], form.rate)


def content_digest(path: Path) -> str:
    """Two files of one digest are the same, byte for byte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
