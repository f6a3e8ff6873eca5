"""Images as people have them, written one by one, and what each must come to: pixels, or a skip with a reason.

The truth stands beside each file: the picture is turned and coloured here with numpy, never by what reads it back.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from cinemesh.data.stills import read_still
from cinemesh.data.video import BadClip

Pixels = NDArray[np.uint8]  # [H, W, 3]
RED, GREEN, BLUE, GREY = (200, 30, 40), (20, 180, 60), (30, 60, 220), (128, 128, 128)
HEIGHT, WIDTH = 24, 36
LOSSY = 6  # levels, of flat colours at the best quality
LINEAR = 55  # of 255: of linear light, sRGB's 128 by IEC 61966-2-1


@dataclass(frozen=True)
class OddImage:
    """A file, and what must become of it: the picture ``seen``, or what is said of a skip."""

    name: str
    write: Callable[[], bytes]
    seen: Pixels | None = None
    says: str = ""
    off: int = 0  # levels, of any value


def quarters(height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """Four colours, no two alike: each mirroring and turn is another picture."""
    pixels = np.empty((height, width, 3), np.uint8)
    top, left = (height + 1) // 2, (width + 1) // 2
    pixels[:top, :left], pixels[:top, left:] = RED, GREEN
    pixels[top:, :left], pixels[top:, left:] = BLUE, GREY
    return pixels


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


FORMATS: dict[str, tuple[str, dict[str, Any], int]] = {  # suffix: Pillow's name, options, levels that it loses
    "png": ("PNG", {}, 0),
    "bmp": ("BMP", {}, 0),
    "tif": ("TIFF", {}, 0),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}, 0),
    "webp": ("WEBP", {"lossless": True}, 0),
    "avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, LOSSY),
    "jpg": ("JPEG", {"quality": 100, "subsampling": "4:4:4"}, LOSSY),
    "jpeg": ("JPEG", {"quality": 100, "subsampling": "4:4:4", "progressive": True}, LOSSY),
}
TURNS: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF 2.3, tag 0x112: in 6 the first row is the right side
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def written(suffix: str, pixels: Pixels, **more: Any) -> bytes:
    name, options, _ = FORMATS[suffix]
    return encoded(Image.fromarray(pixels), name, **options, **more)


def turned(suffix: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return written(suffix, quarters(), exif=exif)


def linear_profile() -> bytes:
    """sRGB's primaries with light itself as numbers: the curves of its profile are replaced by gamma 1."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(struct.unpack(">I", data[128:132])[0]):
        at = 132 + 12 * entry
        if data[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            offset = struct.unpack(">I", data[at + 4 : at + 8])[0]
            data[offset : offset + 16] = b"curv" + bytes(4) + struct.pack(">I", 0) + bytes(4)
            data[at + 8 : at + 12] = struct.pack(">I", 12)
    return bytes(data)


def flat(level: int) -> Pixels:
    return np.full((HEIGHT, WIDTH, 3), level, np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_gamma() -> bytes:
    data = written("png", flat(100))
    return data[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + data[33:]  # numbers are light


def bomb() -> bytes:
    """A header of 40,000 x 40,000 pixels before a few bytes of data."""
    size = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = (b"IHDR", size), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def see_through(format: str, mode: str) -> bytes:
    image = Image.new("RGBA", (16, 16), (*RED, 255))
    image.putpixel((3, 3), (*RED, 200))
    return encoded(image.convert(mode), format)


def adobe_rgb() -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    return written("jpg", quarters(), exif=exif)


def noise(suffix: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return written(suffix, pixels)


def flipped(suffix: str, part: float) -> bytes:
    data = bytearray(noise(suffix))
    data[int(part * len(data))] ^= 0x10
    return bytes(data)


def cut(suffix: str, part: float) -> bytes:
    data = noise(suffix)
    return data[: int(part * len(data))]


def odd_images() -> Iterator[OddImage]:
    """All of them: above a hundred."""
    yield from _formats()
    yield from _colours()
    yield from _refused()
    yield from _damaged()


def _formats() -> Iterator[OddImage]:
    for suffix, (_, _, off) in FORMATS.items():
        yield OddImage(f"a.{suffix}", lambda s=suffix: written(s, quarters()), quarters(), off=off)
        yield OddImage(f"CAPITALS.{suffix.upper()}", lambda s=suffix: written(s, quarters()), quarters(), off=off)
    for suffix in ("png", "jpg", "webp", "tif"):
        for orientation, turn in TURNS.items():
            name = f"turned {orientation}.{suffix}"
            off = FORMATS[suffix][2]
            yield OddImage(name, lambda s=suffix, o=orientation: turned(s, o), turn(quarters()), off=off)
    for height, width in ((1, 1), (1, 300), (300, 1), (97, 161)):
        pixels = quarters(height, width)
        yield OddImage(f"{height} by {width}.png", lambda p=pixels: written("png", p), pixels)
    for name in ("new\nline.png", "ünï çødé 雪.png", "two.jpg.png", ".hidden.png", "http:__colon.png", "a%20b?c#d.png"):
        yield OddImage(name, lambda: written("png", quarters()), quarters())
    for suffix, other in (("jpg", "png"), ("png", "bmp"), ("webp", "jpg")):  # its name says another format
        off = FORMATS[other][2]
        yield OddImage(f"really {other}.{suffix}", lambda o=other: written(o, quarters()), quarters(), off=off)


def _colours() -> Iterator[OddImage]:
    grey = quarters().mean(2).round().astype(np.uint8)
    as_rgb = np.repeat(grey[..., None], 3, 2)
    for suffix in ("png", "bmp", "tif"):
        name = FORMATS[suffix][0]
        yield OddImage(f"grey.{suffix}", lambda n=name: encoded(Image.fromarray(grey), n), as_rgb)
        bits = (grey > 100).astype(np.uint8) * 255
        image = Image.fromarray(bits).convert("1")
        yield OddImage(f"bits.{suffix}", lambda n=name, i=image: encoded(i, n), np.repeat(bits[..., None], 3, 2))
        palette = Image.fromarray(quarters()).quantize(8)
        yield OddImage(f"palette.{suffix}", lambda n=name, i=palette: encoded(i, n), quarters())
    for name, format in (("deep.png", "PNG"), ("deep.tif", "TIFF")):  # Pillow's own conversion cuts 256 and above off
        deep = Image.fromarray(grey.astype(np.uint16) * 257)
        yield OddImage(name, lambda f=format, i=deep: encoded(i, f), as_rgb)
    for suffix in ("png", "tif", "webp"):
        opaque = Image.fromarray(quarters()).convert("RGBA")
        format, options, _ = FORMATS[suffix]
        yield OddImage(f"opaque.{suffix}", lambda f=format, o=options, i=opaque: encoded(i, f, **o), quarters())
    for suffix in ("png", "tif", "webp", "jpg"):
        off = 2 + FORMATS[suffix][2]
        made = lambda s=suffix: written(s, flat(LINEAR), icc_profile=linear_profile())  # noqa: E731
        yield OddImage(f"linear.{suffix}", made, flat(128), off=off)
        yield OddImage(f"no profile.{suffix}", lambda s=suffix: written(s, flat(LINEAR)), flat(LINEAR), off=off)
    yield OddImage("gamma.png", with_gamma, flat(round(255 * (100 / 255) ** (1 / 2.2))), off=1)
    for sampling in ("4:2:2", "4:2:0"):
        made = lambda s=sampling: encoded(Image.fromarray(flat(90)), "JPEG", quality=95, subsampling=s)  # noqa: E731
        yield OddImage(f"sampled {sampling.replace(':', '')}.jpg", made, flat(90), off=LOSSY)


def _refused() -> Iterator[OddImage]:
    colour = Image.fromarray(quarters())
    for suffix, format in (("png", "PNG"), ("webp", "WEBP")):
        yield OddImage(f"animated.{suffix}", lambda f=format: animated(f), says="it is an animation of 3 frames")
    yield OddImage("pages.tif", lambda: animated("TIFF"), says="it holds 3 pages")
    for name, format, mode in (
        ("see-through.png", "PNG", "RGBA"), ("see-through grey.png", "PNG", "LA"), ("see-through.tif", "TIFF", "RGBA"),
        ("see-through.webp", "WEBP", "RGBA"),
    ):  # fmt: skip
        yield OddImage(name, lambda f=format, m=mode: see_through(f, m), says="it is transparent in part")
    yield OddImage("keyed.png", lambda: encoded(colour, "PNG", transparency=GREEN), says="it is transparent in part")
    for suffix, format in (("jpg", "JPEG"), ("tif", "TIFF")):
        inks = colour.convert("CMYK")
        yield OddImage(f"inks.{suffix}", lambda f=format, i=inks: encoded(i, f), says="it is CMYK without a colour")
    yield OddImage("lab.tif", lambda: encoded(colour.convert("LAB"), "TIFF"), says="its pixels are of kind LAB")
    yield OddImage("floats.tif", lambda: encoded(Image.new("F", (8, 8)), "TIFF"), says="its pixels are of kind F")
    yield OddImage("adobe.jpg", adobe_rgb, says="its EXIF says Adobe RGB")
    for suffix in ("png", "jpg", "webp", "tif"):
        made = lambda s=suffix: written(s, quarters(), icc_profile=b"not a profile")  # noqa: E731
        yield OddImage(f"no such profile.{suffix}", made, says="its colour profile cannot be applied")
    yield OddImage("bomb.png", bomb, says="it is larger than an image may be")


def _damaged() -> Iterator[OddImage]:
    for suffix in ("png", "bmp", "tif", "webp", "jpg", "avif"):
        for part in (0.3, 0.6, 0.9):
            yield OddImage(f"cut at {part:.0%}.{suffix}", lambda s=suffix, p=part: cut(s, p), says="it ")
        yield OddImage(f"empty.{suffix}", lambda: b"", says="it is no image that Pillow reads")
    for part in (0.3, 0.5, 0.8):
        yield OddImage(f"flipped at {part:.0%}.png", lambda p=part: flipped("png", p), says="it cannot be decoded")
    yield OddImage("page.jpg", lambda: b"<html>not found</html>", says="it is no image that Pillow reads")


def check_image(odd: OddImage, folder: Path) -> str:
    """Write and read it: "pixels" or "skipped". Raises AssertionError for anything else than what must become of it."""
    path = folder / odd.name
    path.write_bytes(odd.write())
    try:
        pixels = np.asarray(read_still(path)).astype(int)
    except BadClip as bad:
        assert odd.seen is None, f"{odd.name} is skipped: {bad.reason}"
        assert bad.reason.startswith(odd.says), bad.reason
        return "skipped"
    assert odd.seen is not None, f"{odd.name} is taken, and {odd.says!r} should be said of it"
    assert pixels.shape == odd.seen.shape
    assert np.abs(pixels - odd.seen).max() <= odd.off, f"{odd.name}: {np.abs(pixels - odd.seen).max()} levels off"
    return "pixels"
