"""From decoded frames to the pixels that people see: colours, orientation, shape. What is not applied is refused.

A frame without tags has BT.709's matrix from 720 lines on, BT.601's below, and limited range, as players assume; its
primaries and transfer are taken for those of the screen (BT.709), as are their near twins of SD and 8-bit video.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideData, Type
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray
from PIL import Image

RgbPixels = NDArray[np.uint8]  # [H, W, 3]

UNTOLD = 2  # of matrix, primaries and transfer: ISO/IEC 23091-2, as all codes here
RGB = 0  # as a matrix: none
HD_LINES = 720  # a frame without a matrix has BT.709's from here on: what players do
# FCC's, BT.601's in both its versions and SMPTE 240M's, BT.2020's with constant coefficients.
MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
PRIMARIES = {1, UNTOLD, 4, 5, 6, 7, 22}  # BT.709, and SD's: at most some levels away on a screen
TRANSFERS = {1, UNTOLD, 4, 5, 6, 7, 11, 13, 14, 15}  # BT.709, SD's, gamma 2.2 and 2.8, sRGB, BT.2020's: all SDR
REFUSED_TRANSFERS: Mapping[int, str] = {16: "PQ (HDR)", 18: "HLG (HDR)", 8: "linear light"}
REFUSED_SIDE_DATA: Mapping[Type, str] = {
    Type.STEREO3D: "it is stereoscopic",
    Type.SPHERICAL: "it is a 360 degree video",
    Type.DOVI_RPU_BUFFER: "it is Dolby Vision",
    Type.DOVI_METADATA: "it is Dolby Vision",
}
OPAQUE = 255
UNIT = 2**16  # of a display matrix: fixed point, ISO/IEC 14496-12
# Limited to full range, of grey frames, which have no colour planes that the scaler would convert.
GREY_LEVELS = np.clip((np.arange(256) - 16) * 255 / 219 + 0.5, 0, 255).astype(np.uint8)


def unshowable(frame: av.VideoFrame) -> str | None:
    """Why a frame cannot be shown as it is meant, None where it can."""
    if frame.color_primaries not in PRIMARIES:
        return (
            f"its colour primaries are number {frame.color_primaries} (wide gamut), and only BT.709 and SD's are read"
        )
    if frame.color_trc not in TRANSFERS:
        named = REFUSED_TRANSFERS.get(frame.color_trc, f"number {frame.color_trc}")
        return f"its transfer function is {named}, and there is no tone mapping"
    if not _is_rgb(frame) and frame.colorspace not in (*MATRICES, UNTOLD):
        return f"its colour matrix is number {frame.colorspace}, which is not read"
    kinds = _kinds(frame)
    if kinds is None:
        return "it carries side data of a kind that PyAV does not know"
    for kind, said in REFUSED_SIDE_DATA.items():
        if kind in kinds:
            return said
    if turned(frame) is None:
        return "its display matrix turns it by no multiple of 90 degrees"
    if _has_alpha(frame) and (frame.reformat(format="rgba").to_ndarray()[..., 3] != OPAQUE).any():
        return "it is transparent in part"
    return None


def looks(frame: av.VideoFrame) -> tuple[object, ...]:
    """All that ``unshowable`` depends on, and the size; a transparent frame looks like no other."""
    tags = frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range
    return frame.format.name, frame.width, frame.height, *tags, _kinds(frame), frame.pts if _has_alpha(frame) else None


def fitted(frame: av.VideoFrame, pixel_aspect: Fraction, height: int, width: int) -> RgbPixels:
    """uint8 [height, width, 3], RGB: the frame upright, its pixels square, scaled and cropped about its centre.

    ``pixel_aspect``: width over height of a pixel as stored.
    """
    pixels, on_its_side = upright(frame)
    return fit(Image.fromarray(pixels), 1 / pixel_aspect if on_its_side else pixel_aspect, height, width)


def aspect(frame: av.VideoFrame, pixel_aspect: Fraction) -> Fraction:
    """Width over height of a frame as it is shown: upright, its pixels square."""
    stored = Fraction(frame.width, frame.height) * pixel_aspect
    turn = turned(frame)
    return 1 / stored if turn is not None and turn[0] else stored


def fit(image: Image.Image, pixel_aspect: Fraction, height: int, width: int) -> RgbPixels:
    """An RGB image scaled and cropped about its centre to uint8 [height, width, 3]."""
    wide, high = image.size
    shape = Fraction(width, height) / pixel_aspect  # of the crop, in stored pixels
    kept_w, kept_h = min(Fraction(wide), high * shape), min(Fraction(high), wide / shape)
    left, top = (wide - kept_w) / 2, (high - kept_h) / 2
    box = float(left), float(top), float(left + kept_w), float(top + kept_h)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def upright(frame: av.VideoFrame) -> tuple[RgbPixels, bool]:
    """RGB as it is to be seen, and whether height and width changed places."""
    turn = turned(frame)
    assert turn is not None  # else refused
    transposed, mirrored, flipped = turn
    pixels = _rgb(frame)
    pixels = pixels.transpose(1, 0, 2) if transposed else pixels
    pixels = pixels[:, ::-1] if mirrored else pixels
    return np.ascontiguousarray(pixels[::-1] if flipped else pixels), transposed


def _side_data(frame: av.VideoFrame) -> Iterable[SideData]:
    return cast(Iterable[SideData], frame.side_data)  # a mapping that iterates over its values


def _kinds(frame: av.VideoFrame) -> frozenset[Type] | None:
    """Of its side data; None where PyAV has no name for one."""
    try:
        return frozenset(data.type for data in _side_data(frame))
    except ValueError:
        return None


def turned(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """Of the display matrix: transposed, then mirrored left to right, then upside down; None: it is of no such kind."""
    if Type.DISPLAYMATRIX not in (_kinds(frame) or ()):
        return False, False, False
    data = next(data for data in _side_data(frame) if data.type is Type.DISPLAYMATRIX)
    matrix = struct.unpack("=9i", bytes(data))
    a, b, _, c, d = (round(value / UNIT, 3) for value in matrix[:5])
    if b == c == 0 and abs(a) == abs(d) == 1:  # x' = a x + c y, y' = b x + d y
        return False, a < 0, d < 0
    return (True, c < 0, b < 0) if a == d == 0 and abs(b) == abs(c) == 1 else None


def _rgb(frame: av.VideoFrame) -> RgbPixels:
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    if _is_rgb(frame):
        return _converted(frame)
    if frame.format.name.startswith("gray"):
        pixels = _converted(frame)  # as full range, which FFmpeg's grey is unless tagged
        return GREY_LEVELS[pixels] if frame.color_range == ColorRange.MPEG else pixels
    untold = Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601
    return _converted(
        frame,
        src_colorspace=MATRICES.get(frame.colorspace, untold),
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    )


def _converted(frame: av.VideoFrame, **colours: Colorspace | ColorRange) -> RgbPixels:
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
    made = frame.reformat(format="rgb24", interpolation=exact, **colours)  # type: ignore[arg-type]
    return cast(RgbPixels, made.to_ndarray())


def _is_rgb(frame: av.VideoFrame) -> bool:
    return frame.format.is_rgb or frame.colorspace == RGB or frame.format.name in ("pal8", "monow", "monob")


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
