"""The adversary: a patch discriminator (Isola et al. 2017) that also looks at neighbouring frames.

LDM's form, 2.5D like the autoencoder: convolutions of 4 x 4 that halve height and width, each followed by one over
time. Norms are of one frame: those of a batch would tie a sample's loss to the ranks that its neighbours are on.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import reset_all
from .config import COLOURS
from .layers import Conv, Norm

KERNEL = 4
SLOPE = 0.2  # of LeakyReLU
GROUPS = 8
MOST_TIMES = 8  # of the width, in the deepest layer


class Discriminator(nn.Module):
    """Frames [B, T, 3, H, W] in [-1, 1] to judgements [B, T, 1, h, w]; higher is more real."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [width * min(MOST_TIMES, 1 << level) for level in range(layers + 1)]
        self.conv_in = Conv(COLOURS, width, KERNEL, "1d", stride=2, padding=(1, 1))
        self.convs = nn.ModuleList(
            Conv(a, b, KERNEL, "1d", stride=2 if level < layers - 1 else 1, padding=(1, 1))
            for level, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(Norm(GROUPS, b) for b in widths[1:])
        self.conv_out = Conv(widths[-1], 1, KERNEL, "1d", padding=(1, 1))

    def initialise(self, seed: int) -> None:
        reset_all(self, seed)

    def forward(self, frames: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(frames), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        return self.conv_out(x)
