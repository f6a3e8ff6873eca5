"""The terms of the loss, by hand; the discriminator's adaptive weight; frozen features."""

from __future__ import annotations

import math

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.model.tae.autoencoder import Posterior
from cinemesh.model.tae.discriminator import Discriminator
from cinemesh.model.tae.features import Lite0
from cinemesh.model.tae.losses import (
    LossWeights,
    adaptive_weight,
    check_positions,
    hinge,
    kl_divergence,
    loss_terms,
    outlier_penalty,
)


def test_the_outlier_penalty_by_hand() -> None:
    """A 4 x 4 latent of two channels, zero but for one dot (3, 4) of norm 5.

    Means are 3/16 and 4/16; deviations of the dot 45/16 and 60/16, norm 75/16; every other position 5/16 away. Each
    channel's std is its dot times sqrt(15)/16: together 5 sqrt(15)/16. Beyond 3 of these the dot is by
    75/16 - 15 sqrt(15)/16, the others by nothing; over 16 positions.
    """
    latent = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    latent[0, :, 1, 2] = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = (75 - 15 * math.sqrt(15)) / 16 / 16
    assert outlier_penalty(latent).item() == pytest.approx(expected, rel=1e-12) and expected > 0.06
    assert outlier_penalty(latent, r=4.0).item() == 0
    flat = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert outlier_penalty(flat).max() == 0  # of 16 normals none is beyond 3 std of two channels together


def test_the_penalty_pulls_the_dot_alone() -> None:
    latent = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    latent[0, 0, 1, 2] = 5.0
    latent.requires_grad_(True)
    outlier_penalty(latent + 1e-6 * torch.randn_like(latent)).sum().backward()
    assert latent.grad is not None
    assert latent.grad[0, 0, 1, 2] > 3 * latent.grad[0].abs().flatten().sort().values[-2]


@pytest.mark.parametrize(("size", "fires"), [((2, 5), False), ((3, 4), True)])
def test_of_ten_positions_none_is_an_outlier(size: tuple[int, int], fires: bool) -> None:
    """One dot of n deviates by sqrt(n - 1) std at most: the rule, and that it is no stricter than it must be."""
    latent = torch.zeros(1, 1, *size)
    latent[..., 0, 0] = 100.0
    assert (outlier_penalty(latent).item() > 1e-3) is fires
    if fires:
        check_positions(*size)
    else:
        with pytest.raises(CinemeshError, match="have 10 positions, and of at most 10 none is beyond 3 standard"):
            check_positions(*size)


def test_the_divergence_is_torchs() -> None:
    random = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 50, generator=random, dtype=torch.float64)
    own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    its = torch.distributions.kl_divergence(own, torch.distributions.Normal(torch.zeros_like(mean), 1.0))
    torch.testing.assert_close(kl_divergence(Posterior(mean, log_variance)), its)


def test_a_weight_goes_with_its_reduction() -> None:
    """At 1024 px the paper's 1e5 beside sums over a frame is 1e5 / (3 * 1024**2) = 0.0318 beside means: one gradient.

    Shown on 16 px: with the weight times 3 * 16**2, and the loss over the same.
    """
    assert pytest.approx(0.0318, abs=1e-4) == 1e5 / (3 * 1024**2)
    random = torch.Generator().manual_seed(0)
    pixels, again = torch.rand(2, 2, 3, 3, 16, 16, generator=random, dtype=torch.float64)
    mean = torch.randn(2, 1, 4, 6, 6, generator=random, dtype=torch.float64)
    mean[0, 0, :, 2, 2] = 40.0
    posterior = Posterior(mean, torch.zeros_like(mean))
    values = 3 * 16 * 16
    by_mean = loss_terms(LossWeights(outlier=0.05, kl=0.0), pixels, again, posterior, None)
    by_frame = loss_terms(LossWeights(outlier=0.05 * values, kl=0.0, reduction="frame"), pixels, again, posterior, None)
    assert by_frame.total.item() == pytest.approx(values * by_mean.total.item(), rel=1e-12)
    assert by_mean.values["outlier"] > 0.01
    by_hand = (again - pixels).abs().mean() + 0.05 * outlier_penalty(mean.flatten(0, 1)).mean()
    assert by_mean.total.item() == pytest.approx(by_hand.item(), rel=1e-12)
    summed = loss_terms(LossWeights(kl=1e-6, reduction="frame"), pixels, again, posterior, None)
    kl = 0.5 * mean.square().sum() / 6  # over both clips, three frames each
    assert summed.total.item() == pytest.approx(((again - pixels).abs().sum() / 6 + 1e-6 * kl).item(), rel=1e-12)


def test_the_adversarial_weight_makes_both_gradients_as_long() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(a, b).item() == pytest.approx(10, rel=1e-3)
    assert adaptive_weight(a, torch.zeros(2)).item() == 1e4  # LDM's ceiling


def test_a_discriminator_learns_to_tell_noise_from_ramps() -> None:
    """Judgements of clips and images; after some steps the hinge is lower, and real is above made."""
    judge = Discriminator(8, 2)
    judge.initialise(0)
    random = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(2, 3, 3, 32, 32).contiguous()
    noise = torch.rand(2, 3, 3, 32, 32, generator=random) * 2 - 1
    assert judge(ramp).shape[:3] == (2, 3, 1) and judge(ramp[:, :1]).shape[:3] == (2, 1, 1)
    before = hinge(judge(ramp), judge(noise)).item()
    optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        hinge(judge(ramp), judge(noise)).backward()
        optimizer.step()
    assert hinge(judge(ramp), judge(noise)) < 0.5 * before and judge(ramp).mean() > judge(noise).mean()
    assert hinge(torch.tensor([2.0]), torch.tensor([-2.0])) == 0  # beyond the margin nothing is learnt


def test_features_see_blur_as_further_than_a_shift_of_brightness() -> None:
    """Frozen, of every pair; 0 of equal images, more of a blurred checkerboard than of a slightly darker one."""
    features = Lite0()
    assert not any(parameter.requires_grad for parameter in features.parameters()) and not features.train().training
    board = ((torch.arange(64)[:, None] // 4 + torch.arange(64) // 4) % 2).float() * 1.6 - 0.8
    board = board.expand(1, 3, 64, 64).contiguous()
    blurred = torch.nn.functional.avg_pool2d(board, 5, 1, 2)
    same, darker, soft = (features.distance(board, other).item() for other in (board, board * 0.95, blurred))
    assert same == 0 and 0 < darker < 0.2 * soft
    assert [level.shape[-1] for level in features.levels(board)] == [32, 16, 8, 4]
    assert features.embedding(board).shape == (1, 1280)
    image = board.clone().requires_grad_(True)
    features.distance(image, blurred).sum().backward()
    assert image.grad is not None and image.grad.abs().max() > 0
