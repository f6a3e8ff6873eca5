"""Clips as they are written: mp4, and a contact sheet of several. Frames are uint8 tensors [T, H, W, 3] in RGB."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import CinemeshError
from ..files import atomic_file

MOST_FRAMES_PER_S = 1000  # of a video; beyond, its time stamps are wrong
LABEL_PX = 16  # height of a line of text in a contact sheet
TEXT_PX = 12  # size of its letters


def playable(rate: Fraction, what: str) -> Fraction:
    """``rate``, the frames/s of ``what``. Raises CinemeshError for one that no player keeps."""
    if not 0 < rate <= MOST_FRAMES_PER_S:
        raise CinemeshError(
            f"{what} plays at {float(rate):g} frames/s, and a rate is above 0 and at most {MOST_FRAMES_PER_S}",
            remedy="replace it, or write it anew with its rate",
        )
    return rate


BT709 = 1  # its matrix, primaries and transfer function in ISO/IEC 23001-8


CLOCK_TICKS_PER_S = 2**16 - 1  # of a clock of MPEG-4 video: ISO/IEC 14496-2, vop_time_increment_resolution


def write_mp4(path: Path, frames: Tensor, rate: Fraction) -> None:
    """Write uint8 [T, H, W, 3], H and W even, as mp4 of ``rate`` frames/s: H.264, or MPEG-4 where x264 is missing.

    Colours are BT.709's, limited range, and the file says so: a player need not guess them from the size.
    """
    write_pieces(path, [frames], rate)


def write_pieces(path: Path, pieces: Iterable[Tensor], rate: Fraction) -> None:
    """As :func:`write_mp4`, of a clip that comes in pieces [T, H, W, 3], of which one at a time is held."""
    pieces = iter(pieces)
    first = next(pieces)  # what cannot be made leaves nothing behind
    height, width = first.shape[1:3]
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
        for frames in chain((first,), pieces):
            for pixels in frames.numpy():
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def gif(frames: Tensor, rate: Fraction) -> bytes:
    """uint8 [T, H, W, 3] as a GIF that plays without end; its clock has hundredths of a second."""
    first, *others = (Image.fromarray(pixels) for pixels in frames.numpy())
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=float(1000 / rate), loop=0)
    return file.getvalue()


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
