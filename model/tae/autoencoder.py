"""The temporal autoencoder of Movie Gen 3.1.1: LDM's encoder and decoder, inflated over time.

Pixels are [B, T, 3, H, W] in [-1, 1], latents [B, t, C, h, w] before they are normalised. The modules and parameters
of its image half are called as in ``AutoencoderKL`` of the package diffusers.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.philox import Purpose, normals
from .config import COLOURS, TAEConfig, Time
from .layers import Conv, Downsample, FrameAttention, Norm, ResidualBlock, Upsample

# Of the posterior at the start. From 0 on its noise drowns the latents for hundreds of steps (tried: a net on top of
# the linear decoder gained nothing in 275).
FIRST_LOG_VARIANCE = -6.0
LOG_VARIANCE_ENDS = (-30.0, 20.0)  # LDM's
PHILOX_BLOCK = 4  # normals of a counter


class Posterior(NamedTuple):
    """A normal of every latent value, both [B, t, C, h, w]."""

    mean: Tensor
    log_variance: Tensor

    def at(self, noise: Tensor) -> Tensor:
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


class Autoencoder(nn.Module):
    """What training and the codec need of an autoencoder, whatever its body."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # inner activations in backward, in place of keeping them

    @abstractmethod
    def encode(self, pixels: Tensor) -> Posterior:
        """Of any T of at least 1."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Pixels of t * temporal_stride frames: who knows T cuts the spurious ones behind it."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The weight that makes pixels."""

    def initialise(self, seed: int) -> None:
        """Random weights, of every parameter by its name: the same on every rank."""
        reset_all(self, seed)

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Pixels again, as many frames, and the posterior; without ``noise`` from its mean."""
        posterior = self.encode(pixels)
        latent = posterior.mean if noise is None else posterior.at(noise)
        return self.decode(latent)[:, : pixels.shape[1]], posterior

    def through(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(x)
        return x


def reset_all(net: nn.Module, seed: int) -> None:
    """Give a net its first weights: those drawn are a function of seed, name and element alone."""
    names = {parameter: name for name, parameter in net.named_parameters()}

    def draw(parameter: nn.Parameter, std: float) -> None:
        blocks = torch.arange(-(-parameter.numel() // PHILOX_BLOCK))
        zero = torch.tensor(0)
        drawn = normals(seed, Purpose.INIT, zero, zero + zlib.crc32(names[parameter].encode()), blocks)
        with torch.no_grad():
            parameter.copy_(drawn.flatten()[: parameter.numel()].view(parameter.shape) * std)

    for module in reversed(list(net.modules())):  # those inside first
        if isinstance(module, Norm):
            module.reset_parameters()
        elif (reset := getattr(module, "reset", None)) is not None:
            reset(draw)


def posterior_of(moments: Tensor) -> Posterior:
    """Mean and log-variance, one behind the other on channels."""
    mean, log_variance = moments.chunk(2, 2)
    return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_ENDS))


class Middle(nn.Module):
    """At the coarsest level: a block, attention, a block."""

    def __init__(self, width: int, groups: int, time: Time) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width, groups, time) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(width, groups, time)])

    @property
    def layers(self) -> list[nn.Module]:
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class Level(nn.Module):
    """Residual blocks, and what leads to the next level."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, time: Time) -> None:
        super().__init__()
        ways = [inputs, *[outputs] * blocks]
        self.resnets = nn.ModuleList(ResidualBlock(a, b, groups, time) for a, b in pairwise(ways))
        self.downsamplers = self.upsamplers = nn.ModuleList()

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers, *self.upsamplers]


def layers_of(levels: nn.ModuleList) -> list[nn.Module]:
    return [layer for level in levels if isinstance(level, Level) for layer in level.layers]


class Half(nn.Module):
    """What encoder and decoder share: a first and a last convolution, levels, a middle."""

    def __init__(self, config: TAEConfig, inputs: int, first: int, last: int, outputs: int) -> None:
        super().__init__()
        self.conv_in = Conv(inputs, first, 3, config.time)
        self.mid_block = Middle(config.widths[-1], config.groups, config.time)
        self.conv_norm_out = Norm(config.groups, last)
        self.conv_out = Conv(last, outputs, 3, config.time)


class EncoderHalf(Half):
    def __init__(self, config: TAEConfig) -> None:
        widths = config.widths
        super().__init__(config, COLOURS, widths[0], widths[-1], 2 * config.channels)
        self.down_blocks = nn.ModuleList(
            Level(a, b, config.blocks, config.groups, config.time) for a, b in pairwise((widths[0], *widths))
        )
        for level, width in zip(self.down_blocks, widths[:-1], strict=False):
            level.downsamplers = nn.ModuleList([Downsample(width, config.time)])

    @property
    def layers(self) -> list[nn.Module]:
        return [self.conv_in, *layers_of(self.down_blocks), *self.mid_block.layers]


class DecoderHalf(Half):
    """One residual block a level more than the encoder."""

    def __init__(self, config: TAEConfig) -> None:
        widths = config.widths[::-1]
        super().__init__(config, config.channels, widths[0], widths[-1], COLOURS)
        self.up_blocks = nn.ModuleList(
            Level(a, b, config.blocks + 1, config.groups, config.time) for a, b in pairwise((widths[0], *widths))
        )
        for level, width in zip(self.up_blocks, widths[:-1], strict=False):
            level.upsamplers = nn.ModuleList([Upsample(width, config.time)])

    @property
    def layers(self) -> list[nn.Module]:
        return [self.conv_in, *self.mid_block.layers, *layers_of(self.up_blocks)]


class PyramidAutoencoder(Autoencoder):
    """The paper's."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = EncoderHalf(config), DecoderHalf(config)
        self.quant_conv = Conv(2 * config.channels, 2 * config.channels, 1, config.time)
        self.post_quant_conv = Conv(config.channels, config.channels, 1, config.time)

    def encode(self, pixels: Tensor) -> Posterior:
        return posterior_of(self.quant_conv(self._half(self.encoder, pixels)))

    def decode(self, latent: Tensor) -> Tensor:
        return self._half(self.decoder, self.post_quant_conv(latent))

    def _half(self, half: EncoderHalf | DecoderHalf, x: Tensor) -> Tensor:
        return half.conv_out(F.silu(half.conv_norm_out(self.through(half.layers, x))))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def initialise(self, seed: int) -> None:
        super().initialise(seed)
        with torch.no_grad():
            self.quant_conv.bias[self.config.channels :] = FIRST_LOG_VARIANCE
