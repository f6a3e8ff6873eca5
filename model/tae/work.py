"""What an autoencoder computes for a clip, layer by layer: FLOPs, weights and activations (torch-free).

The same shapes as the modules', counted once more without them; a test holds the FLOPs to be those that torch counts
on the modules themselves. One FLOP is a product or a sum; norms and activations are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from .config import COLOURS, GRID_STRIDE, TAPS, TAEConfig

GRID_REACH, GRID_PIXELS = 3, GRID_STRIDE**3 * COLOURS  # as in ``grid``


class MatrixProduct(NamedTuple):
    """[m, k] x [k, n], ``batch`` times: what a convolution or an attention comes down to."""

    m: int
    n: int
    k: int
    batch: int = 1


@dataclass(frozen=True)
class LayerWork:
    """One layer of one clip. ``outputs``: values that it writes."""

    products: tuple[MatrixProduct, ...]
    weights: int
    outputs: int

    @property
    def flops(self) -> int:
        return sum(2 * p.batch * p.m * p.n * p.k for p in self.products)


@dataclass(frozen=True)
class _At:
    """Where a layer works: frames, rows and columns."""

    t: int
    h: int
    w: int

    @property
    def positions(self) -> int:
        return self.t * self.h * self.w

    def halved(self, time: bool) -> _At:
        return _At(-(-self.t // 2) if time else self.t, self.h // 2, self.w // 2)

    def doubled(self, time: bool) -> _At:
        return _At(2 * self.t if time else self.t, 2 * self.h, 2 * self.w)


def _product(rows: int, inputs: int, outputs: int, bias: int) -> LayerWork:
    return LayerWork((MatrixProduct(rows, outputs, inputs),), inputs * outputs + bias, rows * outputs)


def _conv(
    config: TAEConfig, at: _At, inputs: int, outputs: int, kernel: int, before: int | None = None
) -> Iterator[LayerWork]:
    """Ends at ``at``; ``before``: frames that its spatial part works on, where a stride over time follows."""
    if config.time == "3d" and kernel > 1:
        yield _product(at.positions, inputs * TAPS * kernel**2, outputs, outputs)
        return
    frames = _At(before or at.t, at.h, at.w)
    yield _product(frames.positions, inputs * kernel**2, outputs, outputs)
    if config.time == "1d" and kernel > 1:
        yield _product(at.positions, outputs * TAPS, outputs, outputs)


def _block(config: TAEConfig, at: _At, inputs: int, outputs: int) -> Iterator[LayerWork]:
    yield from _conv(config, at, inputs, outputs, 3)
    yield from _conv(config, at, outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(config, at, inputs, outputs, 1)


def _attend(width: int, sequences: int, tokens: int) -> Iterator[LayerWork]:
    for _ in range(4):
        yield _product(sequences * tokens, width, width, width)
    scores = MatrixProduct(tokens, tokens, width, sequences), MatrixProduct(tokens, width, tokens, sequences)
    yield LayerWork(scores, 0, sequences * tokens * width)


def _middle(config: TAEConfig, at: _At, width: int) -> Iterator[LayerWork]:
    yield from _block(config, at, width, width)
    if config.time == "3d":
        yield from _attend(width, 1, at.positions)
    else:
        yield from _attend(width, at.t, at.h * at.w)
    if config.time == "1d":
        yield from _attend(width, at.h * at.w, at.t)
    yield from _block(config, at, width, width)


def encoder_work(config: TAEConfig, frames: int, height: int, width: int) -> list[LayerWork]:
    """Of one clip, which is encoded at once. Raises CinemeshError for sizes that the stride does not divide."""
    config.latent(frames, height, width)
    return list(_grid(config, frames, height, width, encode=True) if config.body == "grid" else
                _encoder(config, _At(frames, height, width)))  # fmt: skip


def decoder_work(config: TAEConfig, frames: int, height: int, width: int) -> list[LayerWork]:
    """Of the latent of such a clip, which is decoded at once. Raises CinemeshError likewise."""
    t, h, w = config.latent(frames, height, width)
    return list(_grid(config, frames, height, width, encode=False) if config.body == "grid" else
                _decoder(config, _At(t, h, w)))  # fmt: skip


def _encoder(config: TAEConfig, at: _At) -> Iterator[LayerWork]:
    time, widths = config.time != "none", config.widths
    yield from _conv(config, at, COLOURS, widths[0], 3)
    for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
        for number in range(config.blocks):
            yield from _block(config, at, b if number else a, b)
        if level < len(widths) - 1:
            before, at = at.t, at.halved(time)
            yield from _conv(config, at, b, b, 3, before)
    yield from _middle(config, at, widths[-1])
    moments = 2 * config.channels
    yield from _conv(config, at, widths[-1], moments, 3)
    yield from _conv(config, at, moments, moments, 1)


def _decoder(config: TAEConfig, at: _At) -> Iterator[LayerWork]:
    time, widths = config.time != "none", config.widths[::-1]
    yield from _conv(config, at, config.channels, config.channels, 1)
    yield from _conv(config, at, config.channels, widths[0], 3)
    yield from _middle(config, at, widths[0])
    for level, (a, b) in enumerate(pairwise((widths[0], *widths))):
        for number in range(config.blocks + 1):
            yield from _block(config, at, b if number else a, b)
        if level < len(widths) - 1:
            at = at.doubled(time)
            yield from _conv(config, at, b, b, 3)
    yield from _conv(config, at, widths[-1], COLOURS, 3)


def _grid(config: TAEConfig, frames: int, height: int, width: int, *, encode: bool) -> Iterator[LayerWork]:
    at = _At(*config.latent(frames, height, width))
    inputs, outputs = (GRID_PIXELS, 2 * config.channels) if encode else (config.channels, GRID_PIXELS)
    yield from _conv(config, at, inputs, config.width, 1)
    for _ in range(config.blocks):
        yield from _block(config, at, config.width, config.width)
    yield from _conv(config, at, config.width, outputs, 1)
    if encode:
        yield _product(at.positions, GRID_PIXELS, config.channels, config.channels)
    else:
        yield _product(at.positions, config.channels * GRID_REACH**3, GRID_PIXELS, GRID_PIXELS)
