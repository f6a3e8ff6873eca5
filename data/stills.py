"""Still images to the pixels that people see: clips of one frame. What is not applied is refused, by name.

A file without a colour profile is sRGB. A colour profile is applied as browsers do, with black points matched.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..errors import CinemeshError, in_a_line
from .pixels import OPAQUE, fit
from .scenes import IMAGE_SUFFIXES, Scene, SceneTime
from .settings import Cut
from .sources import Source, ending, opened
from .video import BadClip, Survey, Window

# What Pillow raises for damage, beside its own errors: parsers of headers meet what they do not expect.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error, zlib.error)
READ = {"1": "RGB", "L": "RGB", "P": "RGB", "RGB": "RGB", "YCbCr": "RGB", "LA": "RGBA", "PA": "RGBA", "RGBA": "RGBA"}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_TO_EIGHT = 257  # 65535 / 255
SRGB_GAMMA = 1 / 2.2  # of a PNG whose numbers are meant for a screen
GAMMA_TOLERANCE = 0.01  # encoders write it with two to five digits
INTEROPERABILITY, INDEX, ADOBE_RGB = 0xA005, 1, "R03"  # EXIF 2.3, DCF 2.0: a camera's way to say it without a profile


def is_still(path: Source) -> bool:
    """By the end of its name, as folders are searched."""
    return ending(path) in IMAGE_SUFFIXES


def look_at(path: Source, scenes: Sequence[Scene]) -> Survey:
    """Decode an image. Raises BadClip, and CinemeshError for a scene of it that is more than its frame 0."""
    image = read_still(path)
    for scene in scenes:
        if scene.last_frame:
            raise CinemeshError(
                f"scene {scene.name} ends at frame {scene.last_frame}, and {path} is an image, which has frame 0 alone",
                remedy="correct the captions file",
            )
    return Survey([SceneTime(scene, Fraction(0), Fraction(0), Fraction(*image.size)) for scene in scenes], frames=1)


def still_windows(path: Source, cuts: Mapping[str, Sequence[Cut]], scenes: Sequence[Scene]) -> Iterator[Window]:
    """Of each of its scenes, the frame in every bucket's shape. Raises BadClip."""
    image = read_still(path)
    for scene in scenes:
        for cut in cuts[scene.name]:
            pixels = fit(image, Fraction(1), cut.bucket.height, cut.bucket.width)
            yield scene, cut, False, 0, torch.from_numpy(pixels.copy())[None]


def read_still(path: Source) -> Image.Image:
    """The image as RGB, upright, sRGB. Raises BadClip for damage and for what cannot be shown as it is meant."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of harmless oddities in metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with opened(path) as file, Image.open(file) as image:
                if reason := _refused(image):
                    raise BadClip(path, reason)
                image.load()
                return _srgb(path, ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadClip(path, f"it is larger than an image may be ({in_a_line(error)})") from error
    except UnidentifiedImageError as error:
        raise BadClip(path, "it is no image that Pillow reads") from error
    except DAMAGE as error:
        raise BadClip(path, f"it cannot be decoded ({in_a_line(error)})") from error


def _refused(image: Image.Image) -> str | None:
    """Why an image, of which the header is read, is not meant to be seen as one picture."""
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1 and image.format == "TIFF":
        return f"it holds {pictures} pages"
    if pictures > 1 and image.format != "MPO":  # a phone's picture, and depth or a preview behind it
        return f"it is an animation of {pictures} frames"
    if image.mode not in READ and image.mode not in SIXTEEN_BITS and image.mode != "CMYK":
        return f"its pixels are of kind {image.mode}, which is not read"
    if "icc_profile" not in image.info:
        if image.mode == "CMYK":
            return "it is CMYK without a colour profile: nobody knows which inks are meant"
        if image.getexif().get_ifd(INTEROPERABILITY).get(INDEX) == ADOBE_RGB:
            return "its EXIF says Adobe RGB, and it holds no colour profile"
    return None


def _srgb(path: Source, image: Image.Image) -> Image.Image:
    info = image.info
    if image.mode in SIXTEEN_BITS:
        wide = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(wide / SIXTEEN_TO_EIGHT).astype(np.uint8))
    if "transparency" in info or READ.get(image.mode) == "RGBA":
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (OPAQUE, OPAQUE):
            raise BadClip(path, "it is transparent in part")
    if profile := info.get("icc_profile"):
        if image.mode not in ("L", "CMYK"):
            image = image.convert("RGB")
        matched = ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        try:
            given, wanted = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
            made = ImageCms.profileToProfile(image, given, wanted, *matched, flags=flags)
        except (OSError, ImageCms.PyCMSError) as error:
            raise BadClip(path, f"its colour profile cannot be applied ({in_a_line(error)})") from error
        assert made is not None  # not in place
        return made
    image = image.convert("RGB")
    gamma = float(info.get("gamma", SRGB_GAMMA))
    if "srgb" not in info and abs(gamma - SRGB_GAMMA) > GAMMA_TOLERANCE:
        levels = OPAQUE * (np.arange(OPAQUE + 1) / OPAQUE) ** (SRGB_GAMMA / gamma)
        image = image.point([*np.rint(levels).astype(int)] * 3)
    return image
