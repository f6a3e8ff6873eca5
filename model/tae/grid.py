"""An autoencoder that begins as a linear codec of 8x8x8 blocks, and learns what that misses.

Its encoder is a linear map of each block and a residual net on the grid of blocks; its decoder a linear map of the
3x3x3 latents about a block and another net. The nets begin as zero and the maps as those of ``dct-context``, which ten
CPU minutes of the paper's form from scratch do not come near (20 dB against 27).

    P = 8 * 8 * 8 * 3 pixel values of a block: frames, rows, columns, colours
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import FIRST_LOG_VARIANCE, Autoencoder, Posterior, posterior_of
from .config import COLOURS, GRID_STRIDE, TAEConfig
from .layers import Conv, FillNormal, Norm, ResidualBlock

BLOCK = (GRID_STRIDE, GRID_STRIDE, GRID_STRIDE, COLOURS)
PIXELS = GRID_STRIDE**3 * COLOURS
REACH = 3  # latents along time, height and width that a block is decoded from


class Net(nn.Module):
    """Residual blocks of 2.5D on the grid; what it gives begins as zero."""

    def __init__(self, config: TAEConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_in = Conv(inputs, config.width, 1, config.time)
        self.resnets = nn.ModuleList(
            ResidualBlock(config.width, config.width, config.groups, config.time) for _ in range(config.blocks)
        )
        self.norm_out = Norm(config.groups, config.width)
        self.conv_out = Conv(config.width, outputs, 1, config.time)

    def reset(self, draw: FillNormal) -> None:
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)


class GridAutoencoder(Autoencoder):
    """Linear maps, and nets that add to them."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__(config)
        self.analysis = nn.Parameter(torch.empty(config.channels, PIXELS))
        self.offset = nn.Parameter(torch.empty(config.channels))
        self.synthesis = nn.Parameter(torch.empty(PIXELS, config.channels, *[REACH] * 3))
        self.level = nn.Parameter(torch.empty(PIXELS))
        self.sees = Net(config, PIXELS, 2 * config.channels)
        self.shows = Net(config, config.channels, PIXELS)

    def reset(self, draw: FillNormal) -> None:
        """Random maps; those of a codec are better: ``begin_as``."""
        draw(self.analysis, PIXELS**-0.5)
        draw(self.synthesis, self.synthesis[0].numel() ** -0.5)
        for parameter in (self.offset, self.level):
            nn.init.zeros_(parameter)

    def initialise(self, seed: int) -> None:
        super().initialise(seed)
        with torch.no_grad():
            self.sees.conv_out.bias[self.config.channels :] = FIRST_LOG_VARIANCE

    @torch.no_grad()
    def begin_as(self, basis: Tensor, mean: Tensor, std: Tensor, correction: Tensor) -> None:
        """Take the maps of a linear codec.

        ``basis`` [C, P] has orthonormal rows; a latent is (pixels @ basis.T - ``mean``) / ``std``; ``correction``
        [P, C, 3, 3, 3] is added to what the basis says of a latent.
        """
        self.analysis.copy_(basis / std[:, None])
        self.offset.copy_(-mean / std)
        self.synthesis.copy_(correction)
        middle = REACH // 2
        self.synthesis[:, :, middle, middle, middle] += (basis * std[:, None]).T
        self.level.copy_(mean @ basis)

    def encode(self, pixels: Tensor) -> Posterior:
        blocks = to_blocks(pixels)
        moments = self._net(self.sees, blocks)
        linear = F.conv2d(blocks.flatten(0, 1), self.analysis[..., None, None], self.offset)
        mean, log_variance = posterior_of(moments)
        return Posterior(mean + linear.view(mean.shape), log_variance)

    def decode(self, latent: Tensor) -> Tensor:
        around = F.pad(latent.transpose(1, 2), [REACH // 2] * 6, mode="replicate")
        linear = F.conv3d(around, self.synthesis, self.level).transpose(1, 2)
        return from_blocks(linear + self._net(self.shows, latent))

    def _net(self, net: Net, x: Tensor) -> Tensor:
        return net.conv_out(F.silu(net.norm_out(self.through([net.conv_in, *net.resnets], x))))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.shows.conv_out.weight


def to_blocks(pixels: Tensor) -> Tensor:
    """[B, T, 3, H, W] -> [B, t, P, h, w]; the last frame is repeated to fill the last block."""
    missing = -pixels.shape[1] % GRID_STRIDE
    whole = torch.cat([pixels, pixels[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    b, frames, _, height, width = whole.shape
    t, h, w = (size // GRID_STRIDE for size in (frames, height, width))
    split = whole.view(b, t, GRID_STRIDE, COLOURS, h, GRID_STRIDE, w, GRID_STRIDE)
    return split.permute(0, 1, 2, 5, 7, 3, 4, 6).reshape(b, t, PIXELS, h, w)


def from_blocks(blocks: Tensor) -> Tensor:
    """[B, t, P, h, w] -> [B, 8 t, 3, 8 h, 8 w]."""
    b, t, _, h, w = blocks.shape
    split = blocks.view(b, t, *BLOCK, h, w).permute(0, 1, 2, 5, 6, 3, 7, 4)
    return split.reshape(b, t * GRID_STRIDE, COLOURS, h * GRID_STRIDE, w * GRID_STRIDE)
