"""PSNR and SSIM against their formulas, window by window; and what is averaged over what."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cinemesh.data.codec import BlockDCTCodec
from cinemesh.evaluation.reconstruction import Gaussian, psnr, reconstruct, ssim


def noisy(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error() -> None:
    """Every value off by 5: 10 log10(255^2 / 25) dB. Catches uint8 wrap-around (5 - 10 = 251)."""
    a = torch.full((2, 4, 4, 3), 5, dtype=torch.uint8)
    b = torch.full((2, 4, 4, 3), 10, dtype=torch.uint8)
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 25))
    assert psnr(a, a) == math.inf


def ssim_of_window(a: Tensor, b: Tensor) -> float:
    """Of one 11 x 11 window of one colour, by the sums of Wang et al. 2004, equations 13 to 16."""
    weights = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i in range(11) for j in range(11)}
    total = sum(weights.values())
    x, y = ({place: float(values[place]) for place in weights} for values in (a, b))
    mean_x, mean_y = (sum(w * v[p] for p, w in weights.items()) / total for v in (x, y))
    var_x = sum(w * (x[p] - mean_x) ** 2 for p, w in weights.items()) / total
    var_y = sum(w * (y[p] - mean_y) ** 2 for p, w in weights.items()) / total
    both = sum(w * (x[p] - mean_x) * (y[p] - mean_y) for p, w in weights.items()) / total
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def test_ssim_is_the_mean_over_every_window_of_every_frame_and_colour() -> None:
    """Sizes that differ: rows taken for columns would not even multiply; an edge that is padded has more windows."""
    a = noisy((2, 12, 14, 3), 0)
    b = (a.int() + noisy((2, 12, 14, 3), 1).int() // 4).clamp(0, 255).to(torch.uint8)
    windows = [
        ssim_of_window(a[t, i : i + 11, j : j + 11, c], b[t, i : i + 11, j : j + 11, c])
        for t in range(2)
        for i in range(2)
        for j in range(4)
        for c in range(3)
    ]
    assert ssim(a, b) == pytest.approx(sum(windows) / len(windows), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)


def test_a_scene_of_many_windows_counts_as_one() -> None:
    """Means over all windows would count the long scene three times; images are clips of one frame."""
    codec = BlockDCTCodec()
    flat, busy = torch.full((8, 16, 16, 3), 77, dtype=torch.uint8), noisy((8, 16, 16, 3), 2)
    found = reconstruct(codec, [("busy", busy), ("flat", flat), ("flat", flat), ("flat", flat)])
    of = {name: codec.decode(codec.encode(clip)) for name, clip in (("flat", flat), ("busy", busy))}
    assert found.video_psnr_db == pytest.approx((psnr(of["flat"], flat) + psnr(of["busy"], busy)) / 2)
    assert found.video_ssim == pytest.approx((ssim(of["flat"], flat) + ssim(of["busy"], busy)) / 2)
    image = codec.decode(codec.encode(busy[:1]))[:1]
    flat_image = codec.decode(codec.encode(flat[:1]))[:1]
    assert found.image_psnr_db == pytest.approx((psnr(image, busy[:1]) + psnr(flat_image, flat[:1])) / 2)
    assert (found.scenes, found.windows) == (2, 4)


def test_the_frechet_distance_is_that_of_the_matrix_root() -> None:
    """By scipy's square root of the product, on features that do not commute; added in parts; 0 of equal ones."""
    from scipy.linalg import sqrtm

    random = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 5, 5, generator=random, dtype=torch.float64)
    sets = [torch.randn(40, 5, generator=random, dtype=torch.float64) @ mix[i] + i for i in range(2)]
    fitted = [Gaussian(), Gaussian()]
    for gaussian, rows in zip(fitted, sets, strict=True):
        for part in rows.split(17):
            gaussian.add(part)
    means, covariances = [rows.mean(0) for rows in sets], [torch.cov(rows.T, correction=0) for rows in sets]
    root = torch.as_tensor(np.real(sqrtm((covariances[0] @ covariances[1]).numpy())))
    expected = (means[0] - means[1]).square().sum() + (covariances[0] + covariances[1] - 2 * root).trace()
    assert fitted[0].distance(fitted[1]) == pytest.approx(expected.item(), rel=1e-9) and expected > 5
    assert fitted[0].distance(fitted[0]) == pytest.approx(0, abs=1e-6)
