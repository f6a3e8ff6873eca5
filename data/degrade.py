"""What a clip loses on its way to a low-resolution one: degradation of second order, drawn once a clip.

Two rounds of blur, resize, noise and JPEG, as Real-ESRGAN (Wang et al. 2021) makes them of images, then H.264 over all
frames, which is what clips suffer (Chan et al. 2022). Movie Gen 3.1.5 names the order and no ranges: they are
Real-ESRGAN's published ones. Drawn anew for every frame they would teach a model to flicker; the grain alone is.

Frames are uint8 [T, H, W, 3], and float32 [T, 3, H, W] in [0, 1] between two steps. All draws are a function of the
seed, the clip's name and its first frame (``kernels/philox.py``).
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..kernels.philox import normals, uniform

CHOICE_PURPOSE, GRAIN_PURPOSE = 12, 13  # Philox purposes, beside those of kernels.philox, data.order and the cache
Bounds = tuple[float, float]
Filter = Literal["area", "bilinear", "bicubic"]
FILTERS: tuple[Filter, ...] = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class Ranges:
    """Of one round: what is drawn from. Shares are of the clips."""

    blurred: float
    blur_std: Bounds  # pixels, of each axis of a kernel
    directions: tuple[float, float, float]  # shares of clips that grow, shrink and stay in the resize
    factor: Bounds  # of the size, at which they end
    grain_std: Bounds  # levels of 255
    shot: Bounds  # times the grain that 256 photons at white have
    quality: Bounds  # of JPEG


# Real-ESRGAN, options/train_realesrgan_x4plus.yml.
FIRST_ROUND = Ranges(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0), (30.0, 95.0))
SECOND_ROUND = Ranges(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5), (30.0, 95.0))
RADII = (3, 10)  # of a kernel, pixels: 7 to 21 on a side
# Shares of Gaussian, generalised and plateau kernels: of equal axes, and of two.
ROUND, SKEWED = (0.45, 0.12, 0.12), (0.25, 0.03, 0.03)
GENERALISED_POWER, PLATEAU_POWER = (0.5, 4.0), (1.0, 2.0)
RINGING = 0.1  # share of first and second kernels that are a sinc: what sharpening and compression leave
LAST_RINGING = 0.8  # of the clips, at the end
CUTOFF = (math.pi / 3, math.pi)  # of a sinc
GREY_SHARE = 0.4  # of the clips whose grain has no colour
GAUSSIAN_SHARE = 0.5  # of the clips whose grain does not depend on brightness
PHOTONS = 256.0
CRF = (18.0, 35.0)  # of H.264, ours: from hardly seen to what small videos of the web have
BEST_QUALITY, BEST_CRF = 95.0, 10.0  # where nothing is to be lost


class ClipDraws:
    """Numbers of one clip, in the order in which they are asked for."""

    def __init__(self, seed: int, clip: str, first_frame: int) -> None:
        self._seed, self._drawn, self._fields = seed, 0, 0
        self._counter = torch.tensor(first_frame), torch.tensor(zlib.crc32(clip.encode()))

    def within(self, span: Bounds) -> float:
        """Uniform."""
        drawn = uniform(self._seed, CHOICE_PURPOSE, *self._counter, torch.tensor(self._drawn))
        self._drawn += 1
        return span[0] + (span[1] - span[0]) * drawn.item()

    def happens(self, share: float) -> bool:
        return self.within((0.0, 1.0)) < share

    def one_of(self, shares: Sequence[float]) -> int:
        """An index, in proportion to the shares."""
        at = self.within((0.0, sum(shares)))
        return next((i for i in range(len(shares)) if at < sum(shares[: i + 1])), len(shares) - 1)

    def grain(self, *shape: int) -> Tensor:
        """Standard normals, float32; other ones at each call."""
        elements = math.prod(shape)
        place = torch.tensor(self._fields)
        self._fields += 1
        blocks = torch.arange(-(-elements // 4))
        return (
            normals(self._seed, GRAIN_PURPOSE, *self._counter, blocks, place).flatten()[:elements].view(shape).float()
        )


@dataclass(frozen=True)
class Round:
    """One round, drawn. ``grain``: levels of 255, or times that of ``PHOTONS``, where it is ``shot``."""

    kernel: Tensor | None
    factor: float
    filter: Filter
    grain: float
    shot: bool
    grey: bool
    quality: int

    @classmethod
    def drawn(cls, draws: ClipDraws, ranges: Ranges, strength: float) -> Round:
        """``strength`` 1: as published; towards 0 all parameters go to where nothing is lost."""
        kernel = drawn_kernel(draws, ranges.blur_std, strength) if draws.happens(ranges.blurred) else None
        direction = draws.one_of(ranges.directions)
        spans = ((1.0, ranges.factor[1]), (ranges.factor[0], 1.0), (1.0, 1.0))
        factor = draws.within(spans[direction]) ** strength
        filter_ = FILTERS[draws.one_of([1.0] * len(FILTERS))]
        shot = not draws.happens(GAUSSIAN_SHARE)
        grain = strength * draws.within(ranges.shot if shot else ranges.grain_std)
        quality = BEST_QUALITY - strength * (BEST_QUALITY - draws.within(ranges.quality))
        return cls(kernel, factor, filter_, grain, shot, draws.happens(GREY_SHARE), round(quality))


@dataclass(frozen=True)
class Degradation:
    """All that is drawn of a clip but its grain."""

    rounds: tuple[Round, Round]
    ringing: Tensor | None  # the last kernel
    filter: Filter  # of the last resize
    jpeg_last: bool  # or before the last resize
    crf: int

    @classmethod
    def drawn(cls, draws: ClipDraws, strength: float) -> Degradation:
        rounds = Round.drawn(draws, FIRST_ROUND, strength), Round.drawn(draws, SECOND_ROUND, strength)
        ringing = sinc_kernel(draws) if draws.happens(LAST_RINGING * strength) else None
        filter_ = FILTERS[draws.one_of([1.0] * len(FILTERS))]
        crf = BEST_CRF + strength * (draws.within(CRF) - BEST_CRF)
        return cls(rounds, ringing, filter_, draws.happens(0.5), round(crf))


def degraded(frames: Tensor, height: int, width: int, strength: float, draws: ClipDraws) -> Tensor:
    """Frames uint8 [T, H, W, 3] -> uint8 [T, height, width, 3]."""
    drawn = Degradation.drawn(draws, strength)
    first, second = drawn.rounds
    made = _rounded(frames.permute(0, 3, 1, 2).float() / 255, first, draws, frames.shape[1:3])
    made = jpeg(made, first.quality)
    made = _rounded(made, second, draws, (height, width))
    if not drawn.jpeg_last:
        made = jpeg(made, second.quality)
    made = resized(made, height, width, drawn.filter)
    if drawn.ringing is not None:
        made = blurred(made, drawn.ringing)
    if drawn.jpeg_last:
        made = jpeg(made, second.quality)
    return h264(_bytes(made), drawn.crf)


def _rounded(pixels: Tensor, drawn: Round, draws: ClipDraws, size: Sequence[int]) -> Tensor:
    """Blur, resize to the drawn part of ``size``, and grain."""
    if drawn.kernel is not None:
        pixels = blurred(pixels, drawn.kernel)
    height, width = (max(1, round(drawn.factor * side)) for side in size)
    pixels = resized(pixels, height, width, drawn.filter)
    colours = 1 if drawn.grey else 3
    grain = draws.grain(len(pixels), colours, height, width)
    brightness = pixels.mean(1, keepdim=True) if drawn.grey else pixels
    std = drawn.grain * (brightness / PHOTONS).sqrt() if drawn.shot else drawn.grain / 255
    return (pixels + std * grain).clamp(0, 1)


# -- the steps --------------------------------------------------------------------------------------------------------


def drawn_kernel(draws: ClipDraws, std: Bounds, strength: float) -> Tensor:
    """[k, k], float32, sums to 1: a Gaussian, one of another power, a plateau, turned and stretched; or a sinc."""
    if draws.happens(RINGING * strength):
        return sinc_kernel(draws)
    radius = _radius(draws)
    kind = draws.one_of((*ROUND, *SKEWED))
    wide = (std[0], std[0] + strength * (std[1] - std[0]))
    across = draws.within(wide)
    along = draws.within(wide) if kind >= len(ROUND) else across
    turn = draws.within((-math.pi, math.pi))
    y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1).float()] * 2, indexing="ij")
    u, v = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    far = (u / across).square() + (v / along).square()
    shape = kind % len(ROUND)
    if shape == 0:
        kernel = torch.exp(-far / 2)
    elif shape == 1:
        kernel = torch.exp(-far.pow(draws.within(GENERALISED_POWER)) / 2)
    else:
        kernel = 1 / (far.pow(draws.within(PLATEAU_POWER)) + 1)
    return kernel / kernel.sum()


def sinc_kernel(draws: ClipDraws) -> Tensor:
    """[k, k], float32, sums to 1: the circular low-pass filter, whose edges ring."""
    radius, cutoff = _radius(draws), draws.within(CUTOFF)
    line = torch.arange(-radius, radius + 1).double()
    far = torch.hypot(line[:, None], line)
    far[radius, radius] = 1.0
    kernel = cutoff * torch.special.bessel_j1(cutoff * far) / (2 * math.pi * far)
    kernel[radius, radius] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


def _radius(draws: ClipDraws) -> int:
    return RADII[0] + draws.one_of([1.0] * (RADII[1] - RADII[0] + 1))


def blurred(pixels: Tensor, kernel: Tensor) -> Tensor:
    """Every frame and colour by itself; beyond an edge lies its own pixel."""
    pad = len(kernel) // 2
    planes = F.pad(pixels.flatten(0, 1)[:, None], [pad] * 4, mode="replicate")
    return F.conv2d(planes, kernel[None, None]).view_as(pixels).clamp(0, 1)


def resized(pixels: Tensor, height: int, width: int, filter_: Filter) -> Tensor:
    if pixels.shape[2:] == (height, width):
        return pixels
    if filter_ == "area":
        return F.interpolate(pixels, (height, width), mode="area")
    made = F.interpolate(pixels, (height, width), mode=filter_, align_corners=False, antialias=True)
    return made.clamp(0, 1)


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Every frame by itself."""
    made: list[Tensor] = []
    for frame in _bytes(pixels).numpy():
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        made.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(made).permute(0, 3, 1, 2).float() / 255


def h264(frames: Tensor, crf: int) -> Tensor:
    """Frames uint8 [T, H, W, 3] written and read again: H.264, or MPEG-4 of a like quality where x264 is missing."""
    height, width = frames.shape[1:3]
    even = F.pad(frames.permute(0, 3, 1, 2).float(), [0, width % 2, 0, height % 2], mode="replicate").byte()
    there, file = "libx264" in av.codecs_available, io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264" if there else "mpeg4", rate=Fraction(24))
        stream.height, stream.width, stream.pix_fmt = even.shape[2], even.shape[3], "yuv420p"
        stream.codec_context.thread_count = 1  # more would share the frames, and make others of them
        # Without a look ahead: its thread made two files of one clip differ (libx264 of PyAV 18.1, 2026-11).
        alone: dict[str, object] = {"crf": str(crf), "bf": "0", "rc-lookahead": "0", "mbtree": "0"}
        stream.options = alone if there else {"qscale": str(max(1, crf // 2))}
        for pixels in even.permute(0, 2, 3, 1).contiguous().numpy():
            # Converted here: what an encoder converts itself may be overwritten before it is written (PyAV 18.1).
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r") as written:
        made = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    assert len(made) == len(frames)
    return torch.from_numpy(np.stack(made))[:, :height, :width].contiguous()


def _bytes(pixels: Tensor) -> Tensor:
    """[T, 3, H, W] in [0, 1] -> uint8 [T, H, W, 3]."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
