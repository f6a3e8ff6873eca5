"""Videos as people have them, written one by one, and what each must come to: pixels, or a skip with a reason.

The truth stands beside each file: the picture is turned, stretched and coloured here with numpy, by the standards'
formulas, never by what reads it back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cinemesh.data.scenes import Scene
from cinemesh.data.settings import DataSettings
from cinemesh.data.video import BadClip, look_through, read_windows

Picture = NDArray[np.uint8]  # [H, W, 3]
HEIGHT, WIDTH = (
    96,
    192,
)  # rows of RGB that fill whole cache lines: FFmpeg reads past others, and writes files that differ
LEVELS, STEP = 16, 12  # of the patch that numbers the frames: one of 16 greys
DISC = 0.25  # its radius, of the height
SHORT_S = Fraction(1, 2)


@dataclass(frozen=True)
class Odd:
    """A file, and what must become of it: frames as ``seen`` beginning at ``times`` s, or what is said of it."""

    name: str
    write: Callable[[Path], object]
    seen: Picture | None = None  # upright, of square pixels; the number's patch as of frame 0
    times: Sequence[Fraction] = field(default_factory=list[Fraction])  # of its frames
    says: str = ""  # of a skip
    off: int = 10  # levels, on the mean over a quarter
    numbered: bool = True  # its last quarter tells the frame


def picture(height: int = HEIGHT, width: int = WIDTH) -> Picture:
    """Four quarters, the last of which numbers the frame, and a disc, which a wrong shape makes an egg."""
    made = np.empty((height, width, 3), np.uint8)
    top, left = np.arange(height) < height // 2, np.arange(width) < width // 2
    for rows, columns, colour in (
        (top, left, (200, 40, 40)),
        (top, ~left, (40, 180, 40)),
        (~top, left, (40, 40, 200)),
        (~top, ~left, (level(0),) * 3),
    ):
        made[np.ix_(rows, columns)] = colour
    y, x = np.ogrid[:height, :width]
    made[(y - height / 2 + 0.5) ** 2 + (x - width / 2 + 0.5) ** 2 < (DISC * height) ** 2] = 255
    return made


def level(index: int) -> int:
    return 40 + STEP * (index % LEVELS)


def numbered(base: Picture, index: int) -> Picture:
    made = base.copy()
    made[(base == level(0)).all(-1)] = level(index)
    return made


def evenly(rate: Fraction, seconds: Fraction = SHORT_S) -> list[Fraction]:
    return [index / rate for index in range(max(1, int(seconds * rate)))]


@dataclass(frozen=True)
class Made:
    """How a video is written: numbered frames of ``base``, with ``alpha`` that opaque, ``without`` that packet."""

    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    container: str | None = None
    base: Picture | None = None
    rate: Fraction = Fraction(24)
    times: Sequence[Fraction] | None = None
    matrix: Colorspace = Colorspace.ITU601
    full: bool = False
    tags: dict[str, int] | None = None
    turned: float | None = None
    display: tuple[int, ...] | None = None
    pixel_aspect: Fraction | None = None
    options: dict[str, str] | None = None
    frames: Sequence[Picture] | None = None
    alpha: int | None = None
    cover: bool = False
    sound: bool = False
    without: int | None = None

    def write(self, path: Path) -> None:
        base = picture() if self.base is None else self.base
        numbers = range(len(self.times) if self.times else len(evenly(self.rate)))
        shown = self.frames or [numbered(base, index) if base.shape[0] == HEIGHT else base for index in numbers]
        with av.open(str(path), "w", format=self.container) as out:
            stream: Any = out.add_stream(self.codec, rate=self.rate)
            stream.height, stream.width, stream.pix_fmt = *shown[0].shape[:2], self.pix_fmt
            stream.options = self.options or ({"crf": "8"} if self.codec in ("libx264", "libx265", "libsvtav1") else {})
            stream.codec_context.thread_count = 1  # else x264 writes another file each time
            if self.codec == "libx265":
                stream.options = {**stream.options, "x265-params": "log-level=none"}
            if self.codec not in ("libx264", "libx265", "ffv1", "prores_ks", "libsvtav1", "gif", "libvpx-vp9"):
                stream.bit_rate = 4_000_000
            if self.times:
                stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
            if self.pixel_aspect:
                stream.codec_context.sample_aspect_ratio = self.pixel_aspect
            for name, value in (self.tags or {}).items():
                setattr(stream.codec_context, name, value)
            if self.turned is not None:
                stream.set_display_rotation(self.turned)
            if self.display is not None:
                stream.set_display_matrix(self.display)
            art = _cover(out) if self.cover else None
            voice: Any = out.add_stream("aac", rate=44100) if self.sound else None
            packets: list[av.Packet] = []
            for index, pixels in enumerate(shown):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                if self.alpha is not None:
                    opaque = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), self.alpha, np.uint8)], -1)
                    frame = av.VideoFrame.from_ndarray(opaque, format="rgba")
                if not self.pix_fmt.startswith(("rgb", "bgr", "gbr")):
                    ranged = ColorRange.JPEG if self.full or self.pix_fmt.startswith("yuvj") else ColorRange.MPEG
                    frame = frame.reformat(
                        format=self.pix_fmt, dst_colorspace=self.matrix, dst_color_range=ranged, threads=1
                    )
                if self.times:
                    frame.pts, frame.time_base = int(self.times[index] * 1000), Fraction(1, 1000)
                packets += stream.encode(frame)
            packets += stream.encode()
            for number, packet in enumerate(packets):
                if number != self.without:
                    out.mux(packet)
            if art is not None:
                out.mux(art.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
                out.mux(art.encode())
            if voice is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate = 44100
                out.mux(voice.encode(silence))
                out.mux(voice.encode())


def encode(path: Path, **made: Any) -> None:
    """Write a video, as ``Made`` has it."""
    Made(**made).write(path)


def _cover(out: Any) -> Any:
    art = out.add_stream("mjpeg", rate=1)
    art.height = art.width = 32
    art.pix_fmt, art.disposition = "yuvj420p", Disposition.attached_pic
    return art


def sound_only(path: Path, *, cover: bool = False) -> None:
    """A song, with a picture of its cover or without."""
    with av.open(str(path), "w") as out:
        voice: Any = out.add_stream("aac", rate=44100)
        art = _cover(out) if cover else None
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        if art is not None:
            out.mux(art.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            out.mux(art.encode())
        out.mux(voice.encode(silence))
        out.mux(voice.encode())


def noisy(frames: int = 24) -> list[Picture]:
    """Coarse noise that moves: every part of the file is needed to draw it."""
    drawn = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, (WIDTH + 64) // 8, 3), dtype=np.uint8)
    large = np.repeat(np.repeat(drawn, 8, 0), 8, 1)
    return [large[:, index : index + WIDTH] for index in range(frames)]


def damaged(path: Path, damage: str, **made: Any) -> None:
    """A file of noise with a part of it gone or overwritten."""
    encode(path, frames=noisy(), **made)
    whole, drawn = bytearray(path.read_bytes()), random.Random(damage)
    size = len(whole)
    part = slice(size * 6 // 10, size * 8 // 10)  # some whole frames, for the first one alone fills half of a file
    if damage == "flipped bits":
        for _ in range(60):
            whole[drawn.randrange(size // 3, size * 8 // 10)] ^= 1 << drawn.randrange(8)
    elif damage == "zeroed":
        whole[part] = bytes(part.stop - part.start)
    elif damage == "cut out":
        del whole[part]
    elif damage == "overwritten":
        whole[part] = drawn.randbytes(part.stop - part.start)
    else:
        assert damage == "cut short"
        del whole[part.start :]
    path.write_bytes(whole)


def woven(rate: Fraction) -> tuple[list[Picture], list[Picture]]:
    """Interlaced frames, the lower field first, of a bar that moves from field to field; and what that field shows."""

    def bar(field_index: int) -> Picture:
        made = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
        made[:, 16 + 6 * field_index : 48 + 6 * field_index] = 200
        return made

    frames, first = list[Picture](), list[Picture]()
    for index in range(len(evenly(rate))):
        early, late = bar(2 * index), bar(2 * index + 1)
        frames.append(np.where(np.arange(HEIGHT)[:, None, None] % 2, early, late))
        first.append(early)
    return frames, first


def cut_between_frames(path: Path) -> None:
    """The first ten frames of an MXF, whole: nothing in it is damaged, but what it says of its length is wrong."""
    encode(path, codec="mpeg2video", frames=noisy())
    whole, key = path.read_bytes(), bytes.fromhex("060e2b34010201010d01030115")  # of a picture: SMPTE 381M
    path.write_bytes(key.join(whole.split(key)[:11]))


def odd_videos() -> Iterator[Odd]:
    """All of them; a name is a file's."""
    plain, times = picture(), evenly(Fraction(24))

    def odd(name: str, seen: Picture = plain, times: Sequence[Fraction] = times, off: int = 10, **made: Any) -> Odd:
        numbered = "base" not in made and not made.keys() & {"turned", "display"}
        return Odd(name, lambda path: encode(path, **made), seen, times, off=off, numbered=numbered)

    def refused(name: str, says: str, **made: Any) -> Odd:
        return Odd(name, lambda path: encode(path, **made), says=says)

    jpeg = {"pix_fmt": "yuvj420p"}
    containers: tuple[tuple[str, dict[str, Any]], ...] = (
        *((f"h264.{end}", {}) for end in ("mp4", "mov", "m4v", "mkv", "ts", "m2ts", "flv", "avi", "nut", "3gp")),
        ("h265.mp4", {"codec": "libx265"}),
        ("h265.mkv", {"codec": "libx265"}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("av1.ivf", {"codec": "libsvtav1"}),
        ("av1.mp4", {"codec": "libsvtav1"}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("mpeg2.mpg", {"codec": "mpeg2video"}),
        ("mpeg2.vob", {"codec": "mpeg2video"}),
        ("mpeg2.mxf", {"codec": "mpeg2video"}),
        ("mpeg1.mpeg", {"codec": "mpeg1video"}),
        ("motion-jpeg.avi", {"codec": "mjpeg", **jpeg}),
        ("wmv2.wmv", {"codec": "wmv2"}),
        ("wmv1.asf", {"codec": "wmv1"}),
        ("spark.flv", {"codec": "flv"}),
        ("raw.y4m", {"codec": "wrapped_avframe"}),
        ("prores.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
        ("ffv1.mkv", {"codec": "ffv1"}),
        ("huffyuv.avi", {"codec": "huffyuv", "pix_fmt": "yuv422p"}),
        ("rgb.mkv", {"codec": "libx264rgb", "pix_fmt": "rgb24"}),
        ("444.mkv", {"codec": "ffv1", "pix_fmt": "yuv444p"}),
        ("GREY.MKV", {"codec": "ffv1", "pix_fmt": "gray", "full": True}),
        ("with cover.mp4", {"cover": True}),
        ("with sound.mkv", {"sound": True}),
        ("opaque.mkv", {"codec": "ffv1", "pix_fmt": "yuva420p", "alpha": 255}),
    )
    for name, made in containers:
        luma = np.repeat((plain @ np.array([0.299, 0.587, 0.114]))[..., None], 3, -1).round().astype(np.uint8)
        yield odd(name, luma if name == "GREY.MKV" else plain, **made)

    # Turned and mirrored. A positive rotation is counter-clockwise, as in FFmpeg.
    for degrees, turns in ((90, 1), (180, 2), (-90, 3)):
        for end in ("mp4", "mov"):
            yield odd(f"turned by {degrees}.{end}", np.rot90(plain, turns), turned=degrees)
    one, w = 2**16, 2**30
    yield odd("mirrored.mp4", plain[:, ::-1], display=(-one, 0, 0, 0, one, 0, 0, 0, w))
    yield odd("transposed.mp4", plain.transpose(1, 0, 2), display=(0, one, 0, one, 0, 0, 0, 0, w))
    yield refused("askew.mp4", "by no multiple of 90 degrees", turned=45)

    # Pixels that are not square; and turned, where their height becomes their width.
    for aspect in (Fraction(2), Fraction(1, 2), Fraction(4, 3), Fraction(128, 117)):
        wide = plain[:, (np.arange(round(WIDTH * aspect)) / float(aspect)).astype(int)]
        yield odd(f"pixels of {aspect.numerator} to {aspect.denominator}.mp4", wide, pixel_aspect=aspect)
    wide = np.repeat(plain, 2, 1)
    yield odd("turned pixels.mp4", np.rot90(wide), pixel_aspect=Fraction(2), turned=90)

    # Rates, even and not.
    for told in ("10", "12", "15", "24000/1001", "25", "30000/1001", "30", "48", "50", "60000/1001", "60", "120"):
        rate = Fraction(told)
        yield odd(f"{float(rate):.5g} a second.mp4", times=evenly(rate), rate=rate)
        if rate in (12, 25, 60):
            yield odd(f"{rate} a second.mkv", times=evenly(rate), rate=rate)
    uneven = [Fraction(t, 1000) for t in (0, 20, 40, 140, 150, 160, 300, 340, 350, 420, 460, 500)]
    for end in ("mkv", "mp4"):
        yield Odd(f"uneven.{end}", lambda path: encode(path, times=uneven), plain, uneven)
    late = [t + 5 for t in evenly(Fraction(25))]
    yield Odd("late start.mkv", lambda path: encode(path, times=late), plain, late)

    # Colours: matrix and range, of 8 and 10 bit.
    for matrix, code in ((Colorspace.ITU709, 1), (Colorspace.FCC, 4), (Colorspace.ITU601, 5), (Colorspace.ITU601, 6),
                         (Colorspace.SMPTE240M, 7), (Colorspace.BT2020, 9)):  # fmt: skip
        for full in (False, True):
            for pix_fmt in ("yuv420p", "yuv420p10le"):
                name = f"matrix {code} {'full' if full else 'limited'} {pix_fmt}.mkv"
                tags = {"colorspace": code, "color_range": 2 if full else 1}
                yield odd(name, codec="ffv1", pix_fmt=pix_fmt, matrix=matrix, full=full, tags=tags)
    yield odd("untagged hd.mkv", picture(720, 1280), codec="ffv1", base=picture(720, 1280), matrix=Colorspace.ITU709)
    for name, says, tags in (
        ("pq", r"PQ \(HDR\)", {"color_trc": 16}),
        ("hlg", r"HLG \(HDR\)", {"color_trc": 18}),
        ("linear", "linear light", {"color_trc": 8}),
        ("p3", r"primaries are number 12 \(wide gamut\)", {"color_primaries": 12}),
        ("bt2020", r"primaries are number 9 \(wide gamut\)", {"color_primaries": 9}),
        ("ycgco", "matrix is number 8", {"colorspace": 8}),
        ("constant luminance", "matrix is number 10", {"colorspace": 10}),
    ):
        yield refused(f"{name}.mkv", says, codec="ffv1", pix_fmt="yuv420p10le", tags=tags)
    yield refused("see-through.mkv", "transparent in part", codec="ffv1", pix_fmt="yuva420p", alpha=128)

    # Sizes that 4:2:0 and macroblocks do not divide.
    for height, width in ((97, 161), (95, 160), (96, 159), (33, 65), (1, 2)):
        base = picture(height, width)
        yield odd(f"{width} by {height}.mkv", base, codec="ffv1", base=base, off=14 if height > 1 else 255)

    yield Odd("0 bytes.mp4", lambda path: path.touch(), says="cannot be decoded")
    yield Odd("text.mp4", lambda path: path.write_bytes(b"no video" * 99), says="cannot be decoded")
    yield Odd("no link.mp4", lambda path: path.symlink_to("nowhere"), says="cannot be decoded")
    yield Odd("sound only.mp4", sound_only, says="holds no video")
    yield Odd("song with cover.mp4", lambda path: sound_only(path, cover=True), says="holds no video")
    yield refused("no time stamps.h264", "no time stamps", container="h264")
    yield odd("capitals.MP4")
    for name in (
        "new\nline.mp4",
        "http:__colon.mp4",
        "per%05dcent.mp4",
        "ünïcode 視頻.mp4",
        "quo'te\".mkv",
        "-dash.mp4",
    ):
        yield odd(name)

    yield refused("a frame lost.ts", "frames are missing", without=7, options={"bf": "0", "refs": "1"})
    yield Odd("cut short.mxf", cut_between_frames, says="was written to end at 1.000 s")
    says = "cannot be decoded|is damaged|missing|ends at|."
    for codec, ends in (("libx264", ("mp4", "mkv", "flv", "ts")), ("mpeg4", ("mp4", "avi")), ("ffv1", ("mkv",))):
        for end in ends:
            for damage in ("flipped bits", "zeroed", "cut out", "overwritten", "cut short"):
                if (end, damage) != ("ts", "cut short"):  # a broadcast may end anywhere
                    made = {"codec": codec, "damage": damage}
                    yield Odd(f"{codec} {damage}.{end}", lambda path, made=made: damaged(path, **made), says=says)


FPS, SIZE = 24, 48


def check(odd: Odd, folder: Path) -> str:
    """What becomes of a file, ``pixels`` or ``skipped``; an AssertionError where it is not what must."""
    path = folder / odd.name
    odd.write(path)
    scene = Scene("it", odd.name, 0, max(0, len(odd.times) - 1), "x")
    if odd.seen is None:
        with pytest.raises(BadClip, match=odd.says):
            look_through(path, [scene])
        return "skipped"
    found = look_through(path, [scene])
    frames = int((found.spans[0].seconds + Fraction(1, 1000)) * FPS)
    cuts = DataSettings(size=SIZE, frames=frames, fps=FPS).cuts(found.spans)
    ((_, _, _, first, window),) = read_windows(path, found, cuts, [scene])
    assert first == 0 and window.shape == (frames, SIZE, SIZE, 3), (first, window.shape)
    expected = patches(np.asarray(ImageOps.fit(Image.fromarray(odd.seen), (SIZE, SIZE), Image.Resampling.BILINEAR)))
    for place, seen in enumerate(window.numpy()):
        index = sum(time - odd.times[0] <= place / FPS + 0.0011 for time in odd.times) - 1
        told = [*expected[:-1], expected[-1] + level(index) - level(0)] if odd.numbered else expected
        if odd.numbered or not place:
            wrong = np.abs(np.array(patches(seen)) - told)
            wrong = wrong[[0, 1, 2, 4]] if place else wrong  # the disc stands before a part of the number
            assert wrong.max() <= odd.off, (odd.name, place, patches(seen), told)
    return "pixels"


def patches(frame: Picture) -> list[NDArray[np.float64]]:
    """The mean colour in the middle of each quarter, and in the corner that numbers the frame."""
    height, width = frame.shape[:2]
    at = [(slice(n // 8, 3 * n // 8), slice(5 * n // 8, 7 * n // 8)) for n in (height, width)]
    corner = slice(-height // 5, -height // 12), slice(-width // 5, -width // 12)
    here = [*((rows, columns) for rows in at[0] for columns in at[1]), corner]
    return [frame[place].reshape(-1, 3).mean(0) for place in here]
