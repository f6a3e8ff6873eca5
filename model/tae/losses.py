"""What the autoencoder is trained on: reconstruction, KL, features, the outlier penalty, a discriminator. 3.1.1.

The paper has four: reconstruction, discriminator, perceptual, outlier penalty (OPL); as a VAE it has a KL, too. Of
weights it gives that of the OPL alone, 1e5, and no reduction. That fits LDM's own: it sums the reconstruction over all
values of an image. At 1024 px an image has 3 * 1024**2 values, and 1e5 beside their sum is what 1e5 / 3145728 = 0.032
is beside their mean; the re-implementation that took 1e5 beside means lost quality and turned it off. So a weight is
written with its reduction:

    ``mean``    every term is a mean over its values
    ``frame``   every term is summed over the values of one raw frame, a mean over frames; the OPL stays as printed

Adversarial weights are LDM's (Esser et al. 2021, eq. 7): scaled so that on the last layer the gradients of both are as
long. Means are over frames and samples of a rank: ``share`` makes them those of the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CinemeshError
from ...ranges import reals
from .autoencoder import Posterior

OUTLIER_R = 3.0  # 3.1.1: norms beyond so many standard deviations are punished
ADAPTIVE_MOST = 1e4  # LDM's, of the adversarial weight; and what is added to the norm that divides
ADAPTIVE_EPS = 1e-4

TermWeight = Annotated[float, reals(0, 1e9, "0 is none; more is no weight beside others")]
Reduction = Literal["mean", "frame"]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Of every term; 0 leaves it out. ``reduction`` is of all of them (see above)."""

    reduction: Annotated[Reduction, "mean: over a term's values; frame: summed over those of a raw frame"] = "mean"
    absolute: Annotated[TermWeight, "of the absolute error of pixels, which are -1 to 1"] = 1.0
    squared: Annotated[TermWeight, "of its square"] = 0.0
    kl: Annotated[TermWeight, "of the posterior's divergence from a standard normal"] = 1e-6
    perceptual: Annotated[
        TermWeight,
        "of the distance of features of EfficientNet-lite0 (ImageNet), which is no LPIPS; needs the extra tae",
    ] = 0.0
    outlier: Annotated[TermWeight, "of latents whose norm is beyond 3 standard deviations; a mean over positions"] = 0.0
    adversarial: Annotated[TermWeight, "of a patch discriminator, beside the adaptive one"] = 0.0
    adversarial_from: Annotated[
        int, "step from which on the discriminator judges; until then it learns nothing and costs nothing"
    ] = 0

    def values_per_frame(self, term: Tensor, frames: int) -> float:
        """What a mean over the values of a term is multiplied by."""
        return term.numel() / frames if self.reduction == "frame" else 1.0


def kl_divergence(posterior: Posterior) -> Tensor:
    """Of every latent value, from a standard normal."""
    mean, log_variance = posterior
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


def outlier_penalty(latent: Tensor, r: float = OUTLIER_R) -> Tensor:
    """OPL(X, r) = 1/(HW) sum over (i, j) of max(||X_ij - Mean(X)|| - r ||Std(X)||, 0), 3.1.1; [N, C, h, w] -> [N].

    Norms are over channels; mean and std of every channel over h and w; frames of a clip count as so many images.
    """
    away = (latent - latent.mean((2, 3), keepdim=True)).square().sum(1).sqrt()
    spread = latent.var((2, 3), correction=0).sum(1).sqrt()
    return F.relu(away - r * spread[:, None, None]).mean((1, 2))


def check_positions(height: int, width: int) -> None:
    """Raise CinemeshError for latents in which the penalty can never fire.

    Of n values, one is at most sqrt(n - 1) standard deviations from their mean: with n <= r**2 + 1 none is beyond r.
    """
    if height * width <= OUTLIER_R**2 + 1:
        raise CinemeshError(
            f"losses.outlier: latents of {height} x {width} have {height * width} positions, and of at most "
            f"{OUTLIER_R**2 + 1:.0f} none is beyond {OUTLIER_R:g} standard deviations",
            remedy="take larger crops, or set losses.outlier to 0",
        )


@dataclass(frozen=True)
class Terms:
    """The loss of an autoencoder without its adversary, and its terms, each a mean and weighted by nothing."""

    total: Tensor
    values: dict[str, Tensor]


def loss_terms(
    weights: LossWeights, pixels: Tensor, again: Tensor, posterior: Posterior, perceptual: Tensor | None
) -> Terms:
    """``pixels`` and ``again`` [B, T, 3, H, W]; ``perceptual``: of every frame, [B, T]."""
    frames = pixels.shape[0] * pixels.shape[1]
    error = again - pixels
    divergence = kl_divergence(posterior)
    values = {"absolute": error.abs().mean(), "squared": error.square().mean(), "kl": divergence.mean()}
    scale = {name: weights.values_per_frame(error, frames) for name in ("absolute", "squared")}
    scale["kl"] = weights.values_per_frame(divergence, frames)
    if perceptual is not None:
        values["perceptual"], scale["perceptual"] = perceptual.mean(), scale["absolute"]  # LDM adds it to every value
    if weights.outlier:
        values["outlier"], scale["outlier"] = outlier_penalty(posterior.mean.flatten(0, 1)).mean(), 1.0
    total = sum((getattr(weights, name) * scale[name] * value for name, value in values.items()), torch.zeros(()))
    return Terms(total, {name: value.detach() for name, value in values.items()})


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss, of its judgements."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + made).mean())


def adaptive_weight(of_terms: Tensor, of_adversary: Tensor) -> Tensor:
    """From the gradients of both on the last layer, of the whole step."""
    return (of_terms.norm() / (of_adversary.norm() + ADAPTIVE_EPS)).clamp(0.0, ADAPTIVE_MOST)
