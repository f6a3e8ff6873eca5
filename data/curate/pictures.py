"""Pictures of clips as rows keep them: JPEG bytes, of square pixels."""

from __future__ import annotations

import io
from fractions import Fraction

from PIL import Image

THUMB_PX = 160  # long side of a picture on the page
THUMB_QUALITY, STILL_QUALITY = 75, 95  # of JPEG; at 95 measures move by less than between two frames


def square(image: Image.Image, pixel_aspect: Fraction) -> Image.Image:
    """Of square pixels; ``pixel_aspect``: width over height of one as it is."""
    if pixel_aspect == 1:
        return image
    return image.resize((max(1, round(image.width * pixel_aspect)), image.height), Image.Resampling.BILINEAR)


def shrunk(image: Image.Image, short_px: int) -> Image.Image:
    """Its short side at most ``short_px``."""
    scale = short_px / min(image.size)
    if scale >= 1:
        return image
    wide, high = (max(1, round(side * scale)) for side in image.size)
    return image.resize((wide, high), Image.Resampling.BILINEAR, reducing_gap=3.0)


def thumb(image: Image.Image) -> Image.Image:
    """Small enough for a page of many."""
    made = image.copy()
    made.thumbnail((THUMB_PX, THUMB_PX))
    return made


def encode(image: Image.Image, quality: int = THUMB_QUALITY) -> bytes:
    """As JPEG, colours at full size."""
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def decode(data: bytes) -> Image.Image:
    """RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")
