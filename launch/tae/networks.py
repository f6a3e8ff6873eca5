"""The networks of a run, and their states as flat buffers: one gradient to sum, one update, one checkpoint.

    master, gradient, exp_avg, exp_avg_sq, ema   [autoencoder, then the discriminator where there is one]

Parameters of the modules are views of ``master``, their gradients of ``gradient``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...kernels.dtypes import TORCH_DTYPES
from ...kernels.reference import ema_rate
from ...model.tae.building import build
from ...model.tae.discriminator import Discriminator
from .recipe import TAERecipe

FLAT_STATES = ("master", "exp_avg", "exp_avg_sq", "ema")
AUTOENCODER, DISCRIMINATOR = "autoencoder", "discriminator"


def flatten(nets: dict[str, nn.Module], values: Tensor, gradients: Tensor | None) -> None:
    """Make every parameter a view of ``values``, its gradient one of ``gradients``; they keep what they hold."""
    position = 0
    for net in nets.values():
        for parameter in net.parameters():
            end = position + parameter.numel()
            view = values[position:end].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            if gradients is not None:
                parameter.grad = gradients[position:end].view(parameter.shape)
            position = end


class Networks:
    """Of one rank. ``steps`` are those taken; ``updates`` those that were not skipped."""

    def __init__(self, recipe: TAERecipe, device: str) -> None:
        """Initialised by the recipe's seed: the same on every rank."""
        self.recipe, self.device = recipe, device
        config, dtype = recipe.model.build(), TORCH_DTYPES[recipe.state_dtype]
        self.autoencoder = build(config)
        self.autoencoder.initialise(recipe.seed)
        self.autoencoder.recompute = recipe.recompute
        self.nets: dict[str, nn.Module] = {AUTOENCODER: self.autoencoder}
        self.discriminator: Discriminator | None = None
        if recipe.losses.adversarial:
            section = recipe.discriminator
            self.discriminator = Discriminator(section.width, section.layers)
            self.discriminator.initialise(recipe.seed)
            self.nets[DISCRIMINATOR] = self.discriminator
        sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in self.nets.items()}
        self.elements, self.generated = sum(sizes.values()), sizes[AUTOENCODER]
        self.states = {name: torch.zeros(self.elements, dtype=dtype, device=device) for name in FLAT_STATES}
        self.gradient = torch.zeros(self.elements, dtype=dtype, device=device)
        self.average = build(config)  # the running average of the weights, which is what a run is for
        for net in self.nets.values():
            net.to(device)
        self.average.load_state_dict(self.autoencoder.state_dict())
        flatten(self.nets, self.states["master"], self.gradient)
        flatten({AUTOENCODER: self.average.to(device)}, self.states["ema"], None)
        self.average.eval().requires_grad_(False)
        self.states["ema"].copy_(self.states["master"])
        self.steps = self.updates = 0
        settings = recipe.optimizer
        flat = nn.Parameter(self.states["master"])
        flat.grad = self.gradient
        self.optimizer = torch.optim.AdamW(
            [flat], lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self.flat = flat

    def begin_again(self) -> None:
        """Weights were set: their average begins with them."""
        self.states["ema"].copy_(self.states["master"])

    @torch.no_grad()
    def update(self, lr: float) -> float:
        """One step of AdamW on the summed gradient, and of the average; the gradient's norm.

        Where that is not finite nothing changes but the count of steps.
        """
        settings = self.recipe.optimizer
        norm = self.gradient.norm().item()
        self.steps += 1
        if not math.isfinite(norm):
            return norm
        if norm > settings.clip_norm:
            self.gradient.mul_(settings.clip_norm / norm)
        group = self.optimizer.param_groups[0]
        group["lr"] = lr
        # Moments lie in the flat states, where checkpoints find them.
        self.optimizer.state[self.flat] = {
            "step": torch.tensor(float(self.updates)),
            "exp_avg": self.states["exp_avg"],
            "exp_avg_sq": self.states["exp_avg_sq"],
        }
        self.optimizer.step()
        rate = ema_rate(torch.tensor(self.updates + 1), settings.ema_decay).item()
        self.states["ema"].lerp_(self.states["master"], rate)
        self.updates += 1
        return norm

    def set_state(self, steps: int, updates: int) -> None:
        """States were read: they are those after so many steps."""
        self.steps, self.updates = steps, updates
