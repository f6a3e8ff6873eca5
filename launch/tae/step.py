"""One step of an autoencoder's training, on one rank of several: the loss, ONE flat gradient, the update.

Autoencoder and discriminator are updated at once, from the same weights: their gradients lie in one buffer and are
summed over the ranks in one collective. The adversarial weight follows from gradients on the last layer (LDM), those
of the whole step: 2 * its size is summed before, so that the weights do not depend on how many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.tae.autoencoder import Posterior
from ...model.tae.features import Lite0
from ...model.tae.losses import adaptive_weight, hinge, loss_terms
from ...parallel.runtime.comm import Communicator
from ...parallel.runtime.mesh import Mesh
from .feed import PixelBatch
from .networks import Networks

REPLICAS = ("dp_replicate",)


@dataclass(frozen=True)
class Taken:
    """A step that was taken. ``terms``: of the loss, means over the whole batch; ``norm``: of the gradient."""

    loss: float
    norm: float
    terms: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


class TrainStep:
    """Binds the collectives once; each step runs them in the same order on all ranks."""

    def __init__(self, networks: Networks, mesh: Mesh | None) -> None:
        self.networks, self.recipe, self.device = networks, networks.recipe, networks.device
        self.ranks = mesh.plan.world_size if mesh else 1
        self.features = Lite0().to(self.device) if self.recipe.losses.perceptual else None
        self.communicator = Communicator(mesh) if mesh else None
        dtype = networks.gradient.dtype
        if self.features is not None:
            self.features.to(dtype)
        self.last = torch.zeros(2, networks.autoencoder.last_layer.numel(), dtype=dtype, device=self.device)
        self._sum_gradient = self._summing(networks.gradient)
        self._sum_last = self._summing(self.last)

    def take(self, batch: PixelBatch, lr: float) -> Taken:
        """Raises nothing for values that are not finite: the update is then skipped."""
        networks, weights = self.networks, self.recipe.losses
        networks.gradient.zero_()
        pixels = batch.pixels.to(self.device, networks.gradient.dtype)
        judged = networks.discriminator is not None and batch.step >= weights.adversarial_from
        with self._autocast():
            posterior = Posterior(*(moment.to(pixels) for moment in networks.autoencoder.encode(pixels)))
            noise = batch.noise(self.recipe.seed, posterior.mean.shape).to(pixels)
            again = networks.autoencoder.decode(posterior.at(noise))[:, : pixels.shape[1]].to(pixels)
            perceptual = None
            if self.features is not None:
                pair = again.flatten(0, 1), pixels.flatten(0, 1)
                perceptual = self.features.distance(*pair).view(pixels.shape[:2])
        found = loss_terms(weights, pixels, again, posterior, perceptual)
        total, values = found.total, found.values
        if judged:
            adversary = self._adversary(again, found.total)
            total = total + adversary[1] * adversary[0]
            values |= {"adversarial": adversary[0].detach(), "adversarial_weight": adversary[1]}
        (total / self.ranks).backward()
        if judged:
            values["discriminator"] = self._judge(pixels, again.detach())
        self._sum_gradient()
        norm = networks.update(lr)
        means = torch.stack([total.detach(), *values.values()]).double() / self.ranks
        return Taken(*self._reported(means, norm, list(values)))

    def _adversary(self, again: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator says of frames that were made, and the weight of that."""
        discriminator = self.networks.discriminator
        assert discriminator is not None
        for parameter in discriminator.parameters():
            parameter.requires_grad_(False)  # this is not its own lesson
        with self._autocast():
            said = -discriminator(again).mean()
        last = self.networks.autoencoder.last_layer
        for row, loss in zip(self.last, (total, said), strict=True):
            (gradient,) = torch.autograd.grad(loss / self.ranks, last, retain_graph=True)
            row.copy_(gradient.flatten())
        self._sum_last()
        return said, self.recipe.losses.adversarial * adaptive_weight(*self.last)

    def _judge(self, pixels: Tensor, again: Tensor) -> Tensor:
        """The discriminator's own gradient; its loss."""
        discriminator = self.networks.discriminator
        assert discriminator is not None
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)
        with self._autocast():
            loss = hinge(discriminator(pixels), discriminator(again))
        (loss / self.ranks).backward()
        return loss.detach()

    def _reported(self, means: Tensor, norm: float, names: list[str]) -> tuple[float, float, dict[str, float]]:
        """Numbers to tell: of this rank where there is one, else summed with the others'."""
        if self.communicator is not None:
            summed = means.contiguous()
            collective = self.communicator.bind("all_reduce", REPLICAS, summed, summed, None)
            collective.issue()
            collective.wait()
            means = summed
        loss, *values = means.tolist()
        return loss, norm, dict(zip(names, values, strict=True))

    def _summing(self, flat: Tensor) -> Callable[[], None]:
        """A call that sums a buffer over the ranks."""
        if self.communicator is None:
            return lambda: None
        collective = self.communicator.bind("all_reduce", REPLICAS, flat, flat, None)

        def run() -> None:
            collective.issue()
            collective.wait()

        return run

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.recipe.dtype == "bfloat16")
