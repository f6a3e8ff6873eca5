"""How well a codec gives back what it encoded: PSNR and SSIM of clips, and of single frames as clips of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.codec import LatentCodec

WINDOW_PX, WINDOW_STD_PX = 11, 1.5  # of SSIM's Gaussian: Wang et al. 2004, section III.C
LUMINANCE, CONTRAST = 0.01, 0.03  # its K1 and K2, likewise
PEAK = 255.0


@dataclass(frozen=True)
class Reconstruction:
    """Means over scenes, each the mean of its windows; an image is the first frame of a window.

    ``frechet``: between features of all frames of the windows and of what was decoded; None: not asked for.
    """

    video_psnr_db: float
    video_ssim: float
    image_psnr_db: float
    image_ssim: float
    scenes: int
    windows: int
    frechet: float | None = None


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio, dB, of two uint8 clips of one shape; infinite when equal."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8, (a.shape, b.shape)
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two uint8 clips [T, H, W, 3], both sizes at least 11: mean over frames and colours."""
    assert a.shape == b.shape and min(a.shape[1:3]) >= WINDOW_PX, (a.shape, b.shape)
    x, y = (clip.double().permute(0, 3, 1, 2) for clip in (a, b))
    rows, columns = (_window_means(size) for size in x.shape[2:])

    def local_mean(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (LUMINANCE * PEAK) ** 2, (CONTRAST * PEAK) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean().item()


def _window_means(size: int) -> Tensor:
    """The matrix [size - 10, size] that takes the Gaussian mean about every place that has the whole window."""
    offsets = torch.arange(WINDOW_PX, dtype=torch.float64) - WINDOW_PX // 2
    weights = torch.exp(-(offsets**2) / (2 * WINDOW_STD_PX**2))
    band = torch.zeros(size - WINDOW_PX + 1, size, dtype=torch.float64)
    for place in range(len(band)):
        band[place, place : place + WINDOW_PX] = weights / weights.sum()
    return band


class Gaussian:
    """Mean and covariance of features, as they come in, in float64."""

    def __init__(self) -> None:
        self.count, self.sum, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Features [N, D]."""
        rows = rows.double()
        self.count += len(rows)
        self.sum, self.products = self.sum + rows.sum(0), self.products + rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """As of a whole population: two sets are compared that are of one size."""
        return self.products / self.count - self.mean.outer(self.mean)

    def distance(self, other: Gaussian) -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): Frechet's, Dowson and Landau 1982; FID's form.

        The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        shared = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
        spread = self.covariance.trace() + other.covariance.trace() - 2 * shared
        return ((self.mean - other.mean).square().sum() + spread).clamp(min=0).item()


def reconstruct(
    codec: LatentCodec, windows: Iterable[tuple[str, Tensor]], features: Callable[[Tensor], Tensor] | None = None
) -> Reconstruction:
    """Encode and decode ``windows``: scene, and frames uint8 [T, H, W, 3]; at least one.

    ``features`` of frames, [T, D], are what a Frechet distance is taken of.
    """
    given, made = Gaussian(), Gaussian()
    scores: dict[str, list[tuple[float, ...]]] = {}
    for scene, frames in windows:
        video, image = (codec.decode(codec.encode(clip))[: len(clip)] for clip in (frames, frames[:1]))
        if features is not None:
            given.add(features(frames))
            made.add(features(video))
        of = psnr(video, frames), ssim(video, frames), psnr(image, frames[:1]), ssim(image, frames[:1])
        scores.setdefault(scene, []).append(of)
    scenes = torch.stack([torch.tensor(of, dtype=torch.float64).mean(0) for of in scores.values()])
    count, frechet = sum(map(len, scores.values())), given.distance(made) if features is not None else None
    return Reconstruction(*scenes.mean(0).tolist(), scenes=len(scores), windows=count, frechet=frechet)
