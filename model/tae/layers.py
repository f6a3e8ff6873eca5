"""Layers of the temporal autoencoder: a frame's, and what is added over time. Movie Gen 3.1.1.

Activations are [B, T, C, H, W]: spatial layers take the T frames of B clips as so many images, without a copy. What is
added over time begins as nothing (a convolution as the identity, attention as zero), so that a model with it is bit for
bit the one without.

Parameters of spatial layers are called as in ``AutoencoderKL`` of the package diffusers; ``temporal`` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TAPS, Time

NORM_EPS = 1e-6  # of LDM's GroupNorm

FillNormal = Callable[[nn.Parameter, float], None]  # fills a parameter with normals of that std


class Norm(nn.GroupNorm):
    """Over the groups of channels of one frame."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)).view(input.shape)


def each_way(x: Tensor) -> Tensor:
    """[B, C, T, H, W] with its first and last frame once more on either side: not causal (3.1.1)."""
    return F.pad(x, (0, 0, 0, 0, TAPS // 2, TAPS // 2), mode="replicate")


class TemporalConv(nn.Module):
    """A convolution over time at every position; begins as the identity, or as every ``stride``-th frame."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, TAPS))
        self.bias = nn.Parameter(torch.empty(channels))
        self.stride = stride

    def reset(self, draw: FillNormal) -> None:
        nn.init.zeros_(self.weight)
        nn.init.eye_(self.weight[..., TAPS // 2])
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight[..., None, None]
        return F.conv3d(each_way(x.transpose(1, 2)), kernel, self.bias, (self.stride, 1, 1)).transpose(1, 2)


class Conv(nn.Module):
    """A spatial convolution, followed by one over time (``1d``), or one over both (``3d``).

    ``stride`` is that of height and width, ``steps`` that of time; ``padding`` zeros before and behind rows and
    columns, default: half of the kernel. One of ``kernel`` 1 looks at no neighbour, in time neither.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        time: Time,
        *,
        stride: int = 1,
        steps: int = 1,
        padding: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        joint = time == "3d" and kernel > 1
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *[TAPS] * joint, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.temporal = TemporalConv(outputs, steps) if time == "1d" and kernel > 1 else None
        self.stride, self.steps = stride, steps
        before, behind = padding or (kernel // 2, kernel // 2)
        self.padding = before
        self.behind = behind - before  # of LDM's halving convolutions: one row and column behind, none before

    def reset(self, draw: FillNormal) -> None:
        draw(self.weight, 1 / math.sqrt(self.weight[0].numel()))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.behind:
            x = F.pad(x, (0, self.behind, 0, self.behind))
        if self.weight.dim() == 5:
            clip, strides, padding = each_way(x.transpose(1, 2)), (self.steps, self.stride, self.stride), self.padding
            return F.conv3d(clip, self.weight, self.bias, strides, (0, padding, padding)).transpose(1, 2)
        y = F.conv2d(x.flatten(0, 1), self.weight, self.bias, self.stride, self.padding).unflatten(0, x.shape[:2])
        return y if self.temporal is None else self.temporal(y)


class ResidualBlock(nn.Module):
    """LDM's: x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, inputs: int, outputs: int, groups: int, time: Time) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(groups, inputs), Conv(inputs, outputs, 3, time)
        self.norm2, self.conv2 = Norm(groups, outputs), Conv(outputs, outputs, 3, time)
        self.conv_shortcut = Conv(inputs, outputs, 1, time) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class Linear(nn.Linear):
    def reset(self, draw: FillNormal) -> None:
        weight, bias = self.parameters()
        draw(weight, 1 / math.sqrt(self.in_features))
        nn.init.zeros_(bias)


class Attend(nn.Module):
    """FrameAttention of one head over tokens [N, S, C]."""

    def __init__(self, width: int, *, zero: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.zero = zero

    def reset(self, draw: FillNormal) -> None:
        """Of itself: a model calls it after those of what it is made of."""
        if self.zero:
            for parameter in self.to_out.parameters():
                nn.init.zeros_(parameter)

    def attend(self, tokens: Tensor) -> Tensor:
        q, k, v = (each(tokens)[:, None] for each in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])


class TemporalAttention(Attend):
    """Over the T frames at every position; begins as zero."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, zero=True)
        self.group_norm = Norm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 3, 4, 1, 2).reshape(b * h * w, t, c)
        return x + self.attend(tokens).view(b, h, w, t, c).permute(0, 3, 4, 1, 2)


class FrameAttention(Attend):
    """Over the positions of a frame, then over time (``1d``); over the positions of all frames (``3d``)."""

    def __init__(self, width: int, groups: int, time: Time) -> None:
        super().__init__(width)
        self.group_norm = Norm(groups, width)
        self.temporal = TemporalAttention(width, groups) if time == "1d" else None
        self.joint = time == "3d"

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 1, 3, 4, 2)
        tokens = tokens.reshape(b, t * h * w, c) if self.joint else tokens.reshape(b * t, h * w, c)
        x = x + self.attend(tokens).view(b, t, h, w, c).permute(0, 1, 4, 2, 3)
        return x if self.temporal is None else self.temporal(x)


class Downsample(nn.Module):
    """Half of the frames, rows and columns: a strided convolution."""

    def __init__(self, width: int, time: Time) -> None:
        super().__init__()
        steps = 1 if time == "none" else 2
        self.conv = Conv(width, width, 3, time, stride=2, steps=steps, padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice as many frames, rows and columns: the nearest, then a convolution (3.1.1)."""

    def __init__(self, width: int, time: Time) -> None:
        super().__init__()
        self.conv = Conv(width, width, 3, time)
        self.frames = 1 if time == "none" else 2

    def forward(self, x: Tensor) -> Tensor:
        larger = x.repeat_interleave(self.frames, 1) if self.frames > 1 else x
        return self.conv(F.interpolate(larger.flatten(0, 1), scale_factor=2.0).unflatten(0, larger.shape[:2]))
