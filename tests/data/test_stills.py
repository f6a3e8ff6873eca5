"""Images as people see them: each way of writing one ends in its pixels, or in a reason that names it."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from cinemesh.data.buckets import BucketSettings
from cinemesh.data.cache.building import SKIPPED_FILE, build_cache
from cinemesh.data.cache.samples import Cache
from cinemesh.data.encoding import BlockDCT, Encoding
from cinemesh.data.settings import DataSettings
from cinemesh.data.stills import read_still
from cinemesh.data.text import ByteEncoder
from cinemesh.data.video import BadClip
from cinemesh.errors import CinemeshError
from cinemesh.model.codec import BlockDCTCodec

RED, GREEN, BLUE, GREY = (200, 30, 40), (20, 180, 60), (30, 60, 220), (128, 128, 128)
HEIGHT, WIDTH = 24, 36


def quarters() -> Image.Image:
    """Four colours, no two alike: each mirroring and turn is another picture."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    half, middle = HEIGHT // 2, WIDTH // 2
    pixels[:half, :middle], pixels[:half, middle:] = RED, GREEN
    pixels[half:, :middle], pixels[half:, middle:] = BLUE, GREY
    return Image.fromarray(pixels)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def seen(path: Path) -> np.ndarray:
    return np.asarray(read_still(path)).astype(int)


def middles(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The four quarters' colours, row by row."""
    height, width = pixels.shape[:2]
    return [tuple(pixels[y, x]) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "avif", "jpg", "JPEG"])
def test_every_format_gives_its_pixels(tmp_path: Path, suffix: str) -> None:
    """Lossless ones exactly; JPEG and AVIF within what their quality loses of flat colours."""
    path = tmp_path / f"a.{suffix}"
    quarters().save(path, quality=100, subsampling="4:4:4", lossless=suffix == "webp")
    worst = np.abs(seen(path) - np.asarray(quarters()).astype(int)).max()
    assert worst <= {"jpg": 4, "JPEG": 4, "avif": 4}.get(suffix, 0)


@pytest.mark.parametrize(
    ("orientation", "wanted"),
    [
        (1, [RED, GREEN, BLUE, GREY]),
        (2, [GREEN, RED, GREY, BLUE]),
        (3, [GREY, BLUE, GREEN, RED]),
        (4, [BLUE, GREY, RED, GREEN]),
        (5, [RED, BLUE, GREEN, GREY]),
        (6, [BLUE, RED, GREY, GREEN]),
        (7, [GREY, GREEN, BLUE, RED]),
        (8, [GREEN, GREY, RED, BLUE]),
    ],
)
def test_the_turn_of_the_exif_is_applied(tmp_path: Path, orientation: int, wanted: list[tuple[int, ...]]) -> None:
    """EXIF 2.3, tag 0x112: 6 is a picture whose first row is the right side."""
    exif = Image.Exif()
    exif[0x112] = orientation
    quarters().save(tmp_path / "a.png", exif=exif)
    pixels = seen(tmp_path / "a.png")
    assert middles(pixels) == wanted and pixels.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))


def linear_profile() -> bytes:
    """sRGB's primaries with light itself as numbers: the curves of its profile are replaced by gamma 1."""
    data = bytearray(SRGB.tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    for entry in range(count):
        at = 132 + 12 * entry
        if data[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            offset = struct.unpack(">I", data[at + 4 : at + 8])[0]
            data[offset : offset + 16] = b"curv" + bytes(4) + struct.pack(">I", 0) + bytes(4)
            data[at + 8 : at + 12] = struct.pack(">I", 12)
    return bytes(data)


def test_a_colour_profile_is_applied(tmp_path: Path) -> None:
    """Of linear light, 55 of 255 (21.6 %) is sRGB's 128 by IEC 61966-2-1; without the profile it stays 55."""
    grey = Image.new("RGB", (8, 8), (55, 55, 55))
    grey.save(tmp_path / "linear.png", icc_profile=linear_profile())
    grey.save(tmp_path / "plain.png")
    share = 55 / 255
    wanted = 255 * (1.055 * share ** (1 / 2.4) - 0.055)
    assert abs(seen(tmp_path / "linear.png")[4, 4] - wanted).max() <= 1.5
    assert seen(tmp_path / "plain.png")[4, 4].tolist() == [55] * 3


def test_sixteen_bits_grey_palettes_and_gamma_are_applied(tmp_path: Path) -> None:
    """Pillow's own conversion of 16 bits cuts everything above 255 off."""
    Image.fromarray(np.full((8, 8), 257 * 77, np.uint16)).save(tmp_path / "deep.png")
    assert seen(tmp_path / "deep.png")[3, 3].tolist() == [77] * 3
    quarters().quantize(8).save(tmp_path / "palette.png")
    assert middles(seen(tmp_path / "palette.png")) == [RED, GREEN, BLUE, GREY]
    Image.new("L", (8, 8), 90).save(tmp_path / "grey.jpg", quality=100)
    assert np.abs(seen(tmp_path / "grey.jpg")[3, 3] - 90).max() <= 1
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert seen(tmp_path / "bit.png").min() == 255
    data = encoded(Image.new("RGB", (8, 8), (100, 100, 100)))
    chunk = b"gAMA" + struct.pack(">I", 100_000)  # numbers are light
    (tmp_path / "gamma.png").write_bytes(
        data[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    )
    assert abs(seen(tmp_path / "gamma.png")[3, 3] - 255 * (100 / 255) ** (1 / 2.2)).max() <= 1
    opaque = quarters().convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    assert middles(seen(tmp_path / "opaque.png")) == [RED, GREEN, BLUE, GREY]


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def transparent(mode: str) -> bytes:
    image = Image.new("RGBA", (16, 16), (*RED, 255))
    image.putpixel((3, 3), (*RED, 200))
    return encoded(image.convert(mode))


def keyed() -> bytes:
    """An RGB image of which one colour is transparent, by a tRNS chunk."""
    return encoded(quarters(), transparency=GREEN)


def adobe_rgb() -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    return encoded(quarters(), "JPEG", exif=exif)


def bomb() -> bytes:
    """A header of 40,000 x 40,000 pixels before a few bytes of data."""
    size = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def flipped_in_the_middle() -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = bytearray(encoded(noise))
    data[len(data) // 2] ^= 0x10
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "made", "reason"),
    [
        ("a.png", lambda: animated("PNG"), "it is an animation of 3 frames"),
        ("a.webp", lambda: animated("WEBP"), "it is an animation of 3 frames"),
        ("a.tif", lambda: animated("TIFF"), "it holds 3 pages"),
        ("a.png", lambda: transparent("RGBA"), "it is transparent in part"),
        ("a.png", lambda: transparent("LA"), "it is transparent in part"),
        ("a.png", keyed, "it is transparent in part"),
        ("a.jpg", lambda: encoded(quarters().convert("CMYK"), "JPEG"), "it is CMYK without a colour profile"),
        ("a.tif", lambda: encoded(quarters().convert("LAB"), "TIFF"), "its pixels are of kind LAB"),
        ("a.tif", lambda: encoded(Image.new("F", (8, 8)), "TIFF"), "its pixels are of kind F"),
        ("a.jpg", adobe_rgb, "its EXIF says Adobe RGB"),
        ("a.png", lambda: encoded(quarters(), icc_profile=b"not a profile"), "its colour profile cannot be applied"),
        ("a.png", bomb, "it is larger than an image may be"),
        ("a.png", lambda: encoded(quarters())[:-40], "it cannot be decoded"),
        ("a.jpg", lambda: encoded(quarters(), "JPEG")[:-200], "it cannot be decoded"),
        ("a.png", flipped_in_the_middle, "it cannot be decoded"),
        ("a.webp", lambda: encoded(quarters(), "WEBP")[:-30], "it cannot be decoded"),
        ("a.png", lambda: b"", "it is no image that Pillow reads"),
        ("a.jpg", lambda: b"<html>not found</html>", "it is no image that Pillow reads"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(
    tmp_path: Path, name: str, made: Callable[[], bytes], reason: str
) -> None:
    (tmp_path / name).write_bytes(made())
    with pytest.raises(BadClip) as refused:
        read_still(tmp_path / name)
    assert refused.value.reason.startswith(reason), refused.value.reason


def test_images_are_clips_of_one_frame_beside_videos_and_bad_ones_are_skipped(tmp_path: Path) -> None:
    """Cropped and scaled as a video's frame; a caption without a rate; a bucket of more frames takes none."""
    clips = tmp_path / "clips"
    clips.mkdir()
    quarters().save(clips / "a.PNG")
    (clips / "b.jpg").write_bytes(encoded(quarters(), "JPEG")[:-300])
    rows = [f"{{name: {n}, file: {f}, first_frame: 0, last_frame: 0, caption: A {n}.}}" for n, f in CAPTIONED.items()]
    (tmp_path / "captions.yaml").write_text(f"[{', '.join(rows)}]", encoding="utf-8")
    buckets = (BucketSettings(frames=1, height=16, width=16), BucketSettings(frames=1, height=16, width=24))
    settings = DataSettings((str(clips),), tmp_path / "captions.yaml", buckets=buckets, bad_share=0.5)
    codec = BlockDCTCodec()
    encoding = Encoding(BlockDCT(), codec, (ByteEncoder(4, 12, "x"),))
    square, wide = Cache.open(
        str(tmp_path / "cache"), build_cache(settings, encoding, tmp_path / "cache", False)
    ).buckets
    assert [s.scene for s in square.train] == ["picture"] and not len(square.validation)
    assert (wide.train[0].caption, wide.train[0].latent.shape) == ("A picture.", (16, 1, 2, 3))
    shown = np.asarray(quarters().resize((24, 16), Image.Resampling.BILINEAR))
    assert torch.equal(wide.train[0].latent, codec.encode(torch.from_numpy(shown.copy())[None]))
    assert "b.jpg" in (tmp_path / "cache" / SKIPPED_FILE).read_text(encoding="utf-8")
    (tmp_path / "captions.yaml").write_text(f"[{rows[0].replace('last_frame: 0', 'last_frame: 5')}]", encoding="utf-8")
    with pytest.raises(CinemeshError, match=r"scene picture ends at frame 5, and .*a\.PNG is an image"):
        build_cache(settings, encoding, tmp_path / "cache", False)


CAPTIONED = {"picture": "a.PNG", "broken": "b.jpg"}
