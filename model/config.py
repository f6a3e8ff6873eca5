"""Model shapes, presets and the parameter table (torch-free).

Numbers of ``movie-gen-30b`` and ``movie-gen-5b``: Movie Gen (arXiv 2410.13720 v1) Table 1, Fig. 8, sections 3.1.3
and 3.6.2. What the paper leaves open and is chosen here: one shared adaLN linear plus a 6xD table for each layer
(the only form that adds up to 30B), one shared set of position tables, no query/key norm, text lengths 512/256/100.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from ..errors import CinemeshError, did_you_mean
from ..kernels.ops import MOST_ELEMENTS
from ..parallel.ir.fields import MOST_BLOCKS
from ..parallel.ir.units import Parameter
from .block_style import BLOCK_STYLES, BlockName, BlockStyle
from .lora import LORA_TARGETS, Lora, factors_of
from .objective import FLOW_MATCHING, OBJECTIVES, ObjectiveName

MODULATION_ROWS = 6  # shift, scale, gate of self-attention; shift, scale, gate of the FFN (Fig. 8)
MOST_SIZE = 2**24  # of a width, of tokens, of positions
SIGMA_MIN = FLOW_MATCHING.sigma_min
CAPTION_DROPOUT = 0.1  # ours: the paper gives no rate for video; guidance needs an unconditional model
TIME_FEATURES = 256  # sinusoidal features of t, as in DiT; the paper gives no number


@dataclass(frozen=True)
class Encoder:
    """One frozen text encoder: its output ``width`` and the ``tokens`` it contributes to every sample."""

    name: str
    width: int
    tokens: int


def latent_text(latent: Sequence[int]) -> str:
    """As ``2x16x16``."""
    return "x".join(map(str, latent))


LOW_RESOLUTION = "low_resolution"  # the latent condition of a spatial upsampler


@dataclass(frozen=True)
class LatentCondition:
    """A latent of the sample's own grid, concatenated to the noisy one on channels.

    It has rows of its own in the patchifier, which start as zeros: training begins at the model without it.
    """

    name: str
    channels: int

    @property
    def input(self) -> str:
        """The name of the step's input."""
        return f"latents.{self.name}"


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one Movie Gen Video transformer. ``width`` D, ``heads`` H, ``ffn`` F; head dim K = D / H."""

    name: str
    layers: int
    width: int
    heads: int
    ffn: int
    encoders: tuple[Encoder, ...]
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    position_lengths: tuple[int, int, int] = (
        32,
        96,
        96,
    )  # (t, h, w) in patches; 16 -> 32 -> 96 fits 3.2.2
    norm_eps: float = 1e-5  # Table 9
    latent_conditions: tuple[LatentCondition, ...] = ()
    lora: Lora | None = None  # with it, all else is frozen
    objective: ObjectiveName = "flow-matching"  # what is predicted: ``objective.py``
    block: BlockName = "llama3"  # its form: ``block_style.py``

    def __post_init__(self) -> None:
        for what, value, most in self._sizes():
            if type(value) is not int or value < 1:  # True is no size
                raise CinemeshError(
                    f"model {self.name}: {what} is {value!r:.200}", remedy="it must be a whole number of at least 1"
                )
            if value > most:
                raise CinemeshError(
                    f"model {self.name}: {what}({value}) > {most}, more than any model has",
                    remedy=f"use {most} or fewer",
                    what=what,
                    value=value,
                )
        if self.width % self.heads:
            raise CinemeshError(
                f"model {self.name}: width({self.width}) % heads({self.heads}) = {self.width % self.heads}",
                remedy="every head needs the same width: change heads or width",
            )
        names = [condition.name for condition in self.latent_conditions]
        if len({*names, "weight"}) <= len(names) or not all(name.isidentifier() for name in names):
            raise CinemeshError(
                f"model {self.name}: latent conditions are named {names}, and parameters are called after them",
                remedy="give each a name of its own, of letters, digits and underscores, not 'weight'",
            )
        if self.lora is not None and self.lora.rank > self.width:
            raise CinemeshError(
                f"model {self.name}: lora.rank({self.lora.rank}) > width({self.width}), the rank of any product",
                remedy="choose a lower rank, or train all weights",
            )
        for what, value, known in (("objective", self.objective, OBJECTIVES), ("block", self.block, BLOCK_STYLES)):
            if value not in known:
                raise CinemeshError(f"model {self.name}: {what} is {value!r:.200}", remedy=did_you_mean(value, known))
        if self.lora is not None and "gate" in self.lora.targets and not self.style.gated:
            raise CinemeshError(
                f"model {self.name}: lora.targets name gate, and a block of form {self.block} has none",
                remedy="name the products that it has: lora.targets: [q, kv, o, cross.q, cross.kv, cross.o, up, down]",
            )
        if not self.encoders:
            raise CinemeshError(f"model {self.name}: no text encoder", remedy="cross-attention needs at least one")

    def _sizes(self) -> Iterator[tuple[str, int, int]]:
        """Every whole number of a model, in words, with the most that it may be."""
        yield "layers", self.layers, MOST_BLOCKS
        for name in ("width", "heads", "ffn", "channels"):
            yield name, getattr(self, name), MOST_SIZE
        for dim, step, length in zip("THW", self.patch, self.position_lengths, strict=True):
            yield f"patch of {dim}", step, MOST_SIZE
            yield f"positions of {dim}", length, MOST_SIZE
        for encoder in self.encoders:
            yield f"width of text encoder {encoder.name}", encoder.width, MOST_SIZE
            yield f"tokens of text encoder {encoder.name}", encoder.tokens, MOST_SIZE
        for condition in self.latent_conditions:
            yield f"channels of latent condition {condition.name}", condition.channels, MOST_SIZE

    @property
    def base(self) -> ModelConfig:
        """The model without its low-rank factors."""
        return replace(self, lora=None)

    @property
    def style(self) -> BlockStyle:
        return BLOCK_STYLES[self.block]

    @property
    def block_eps(self) -> float:
        """Of the norms in a block."""
        return self.norm_eps if self.style.eps is None else self.style.eps

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_features(self) -> int:
        """Values in one token of the latent: C * kt * kh * kw."""
        return self.channels * math.prod(self.patch)

    def condition_features(self, condition: LatentCondition) -> int:
        """Values of a latent condition in one token."""
        return condition.channels * math.prod(self.patch)

    @property
    def text_tokens(self) -> int:
        return sum(encoder.tokens for encoder in self.encoders)

    def grid(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along (t, h, w) of a latent of (T, H, W). Raises when a dim does not divide or has no position."""
        grid: list[int] = []
        for dim, size, step, limit in zip("THW", latent, self.patch, self.position_lengths, strict=True):
            if size < 1 or size % step:
                raise CinemeshError(
                    f"latent {latent_text(latent)}: {dim}({size}) is no positive multiple of the patch ({step})",
                    remedy="choose another latent",
                )
            if size // step > limit:
                raise CinemeshError(
                    f"latent {latent_text(latent)}: {dim}({size}) / patch({step}) = {size // step} positions, "
                    f"but the table of model {self.name} has {limit}",
                    remedy="use a smaller latent or longer tables",
                )
            grid.append(size // step)
        return grid[0], grid[1], grid[2]

    def tokens(self, latent: tuple[int, int, int]) -> int:
        return math.prod(self.grid(latent))

    def with_text_tokens(self, total: int) -> ModelConfig:
        """The same model with ``total`` text tokens, shared among the encoders in proportion."""
        if total < len(self.encoders):
            raise CinemeshError(
                f"{total} text tokens for {len(self.encoders)} encoders", remedy="every encoder needs at least one"
            )
        scaled = [max(1, total * encoder.tokens // self.text_tokens) for encoder in self.encoders]
        scaled[0] += total - sum(scaled)
        encoders = tuple(replace(e, tokens=n) for e, n in zip(self.encoders, scaled, strict=True))
        return replace(self, encoders=encoders)


REPLICATED_UNIT = "replicated"
CONDITIONING_UNIT = "conditioning"


def block_unit(layer: int) -> str:
    return f"blocks.{layer}"


@lru_cache(maxsize=32)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The parameter table. Inside a unit, decayed parameters come first, so that one index splits them.

    Raises CinemeshError for a parameter whose initial values no counter can tell apart.
    """
    rows = (*_replicated(config), *_conditioning(config), *_block_weights(config))
    if config.lora is not None:
        rows = (*(replace(row, trained=False) for row in rows), *_factors(config.lora, rows))
    largest = max(rows, key=lambda row: row.elements)
    if largest.elements > MOST_ELEMENTS:
        raise CinemeshError(
            f"model {config.name}: {largest.name} {list(largest.shape)} has {largest.elements} elements > "
            f"{MOST_ELEMENTS}, those that the draws of its initial values can tell apart",
            remedy="choose smaller sizes",
        )
    return rows


def trained(config: ModelConfig) -> tuple[Parameter, ...]:
    """The rows of the table that a run changes, and its checkpoints hold."""
    return tuple(row for row in parameters(config) if row.trained)


Init = Literal["normal", "zeros", "ones"]


@dataclass(frozen=True)
class _Table:
    """Rows of one unit, or of one block's part of it: what they have in common."""

    unit: str
    block: int | None = None

    def row(
        self,
        name: str,
        shape: tuple[int, ...],
        part: str,
        *,
        tp: int | None = None,
        init: Init = "normal",
        std: float = 0.0,
        decay: bool = True,
    ) -> Parameter:
        """``std``: of a normal one; ``tp``: the dim that is split over tp."""
        if self.block is None:
            return Parameter(name, shape, tp, self.unit, init, std, decay, part)
        return Parameter(f"{block_unit(self.block)}.{name}", shape, tp, self.unit, init, std, decay, part, name)

    def product(self, name: str, shape: tuple[int, ...], part: str, fan_in: int, tp: int | None = None) -> Parameter:
        """Weights of a product: variance 1 / ``fan_in``."""
        return self.row(name, shape, part, tp=tp, std=fan_in**-0.5)


def _replicated(c: ModelConfig) -> Iterator[Parameter]:
    """All that tp does not split."""
    table, d = _Table(REPLICATED_UNIT), c.width
    yield table.product("patchify.weight", (c.patch_features, d), "patchify", c.patch_features)
    for condition in c.latent_conditions:
        yield table.row(f"patchify.{condition.name}", (c.condition_features(condition), d), "patchify", init="zeros")
    yield table.product("time.first", (TIME_FEATURES, d), "time MLP", TIME_FEATURES)
    yield table.product("time.second", (d, d), "time MLP", d)
    yield table.row("final.weight", (d, c.patch_features), "final layer", init="zeros")
    for axis, length in zip("thw", c.position_lengths, strict=True):
        yield table.row(f"position.{axis}", (length, d), "position tables", std=0.02, decay=False)
    for encoder in c.encoders:
        yield table.row(f"text.{encoder.name}.gain", (d,), "text projections", init="ones", decay=False)
        yield table.row(f"text.{encoder.name}.bias", (d,), "text projections", init="zeros", decay=False)
    for layer in range(c.layers):
        block = _Table(REPLICATED_UNIT, layer)
        for name in ("norm1", "norm2") if c.style.gains else ():
            yield block.row(name, (d,), "norm gains", init="ones", decay=False)
        for name in ("o_bias", "cross.o_bias", "down_bias") if c.style.biases else ():
            yield block.row(name, (d,), "biases", init="zeros", decay=False)
        yield block.row("table", (MODULATION_ROWS, d), "adaLN tables", init="zeros", decay=False)
    yield table.row("final.norm", (d,), "final layer", init="ones", decay=False)
    yield table.row("final.table", (2, d), "final layer", init="zeros", decay=False)


def _conditioning(c: ModelConfig) -> Iterator[Parameter]:
    """What tp splits in front of the blocks."""
    table, d = _Table(CONDITIONING_UNIT), c.width
    yield table.row("adaln.weight", (d, MODULATION_ROWS, d), "shared adaLN", tp=0, init="zeros")
    for encoder in c.encoders:
        shape = (encoder.width, d)
        yield table.product(f"text.{encoder.name}.weight", shape, "text projections", encoder.width, tp=0)


def _block_weights(c: ModelConfig) -> Iterator[Parameter]:
    d, f, h, k = c.width, c.ffn, c.heads, c.head_dim
    residual = 2.0 * c.layers  # branch outputs start smaller by sqrt(2 L), as in GPT-2
    for layer in range(c.layers):
        table = _Table(block_unit(layer), layer)
        for prefix, part in (("", "self-attention"), ("cross.", "cross-attention")):
            yield table.product(f"{prefix}q", (d, h, k), part, d, tp=1)
            yield table.product(f"{prefix}kv", (d, 2, h, k), part, d, tp=2)
            if c.style.biases:  # they decay as the weights beside them: a block's unit decays as a whole
                yield table.row(f"{prefix}q_bias", (h, k), "biases", tp=0, init="zeros")
                yield table.row(f"{prefix}kv_bias", (2, h, k), "biases", tp=1, init="zeros")
            yield table.row(f"{prefix}o", (h, k, d), part, tp=0, std=(d * residual) ** -0.5)
        for name in ("gate", "up") if c.style.gated else ("up",):
            yield table.product(name, (d, f), "FFN", d, tp=1)
        if c.style.biases:
            yield table.row("up_bias", (f,), "biases", tp=0, init="zeros")
        yield table.row("down", (f, d), "FFN", tp=0, std=(f * residual) ** -0.5)


def _factors(lora: Lora, rows: Sequence[Parameter]) -> Iterator[Parameter]:
    """A [inputs, r] and B [r, outputs] of every target of every block, split over tp as the product is.

    What tp does not split goes where all of that kind is. A has the spread of PEFT's uniform draws; B begins as zeros.
    """
    for row in rows:
        if row.in_block not in lora.targets:
            continue
        summed = LORA_TARGETS[row.in_block]
        inputs, outputs, split = row.shape[:summed], row.shape[summed:], row.tp_dim
        assert split is not None
        down, up = factors_of(row.in_block)
        made: tuple[tuple[str, tuple[int, ...], int | None, Init, float], ...] = (
            (down, (*inputs, lora.rank), split if split < summed else None, "normal", (3 * math.prod(inputs)) ** -0.5),
            (up, (lora.rank, *outputs), split - summed + 1 if split >= summed else None, "zeros", 0.0),
        )
        for name, shape, tp, init, std in made:
            unit = REPLICATED_UNIT if tp is None else row.unit
            yield Parameter(f"{row.unit}.{name}", shape, tp, unit, init, std, True, "LoRA", name)


@lru_cache(maxsize=32)
def parameters_by_unit(config: ModelConfig) -> dict[str, tuple[Parameter, ...]]:
    """Unit name -> its parameters, units in the order of the forward pass: replicated, conditioning, blocks."""
    units: dict[str, list[Parameter]] = {}
    for row in parameters(config):
        units.setdefault(row.unit, []).append(row)
    return {unit: tuple(rows) for unit, rows in units.items()}


MOVIE_GEN_ENCODERS = (
    Encoder("ul2", 4096, 512),
    Encoder("metaclip", 1280, 256),
    Encoder("byt5", 1472, 100),
)
_TINY_ENCODERS = (Encoder("ul2", 24, 3), Encoder("metaclip", 24, 2), Encoder("byt5", 24, 2))

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig("movie-gen-30b", 48, 6144, 48, 16384, MOVIE_GEN_ENCODERS),
        # FFN 8192 is not published: the 8/3 rule of the 30B applied to 3072.
        ModelConfig("movie-gen-5b", 32, 3072, 24, 8192, MOVIE_GEN_ENCODERS),
        # 7B, 1024 px, 14 frames and 2x are the paper's (3.1.5). The shape is ours: width and FFN of other 7B
        # transformers, heads of 128, as many layers as make 7.1B; positions for an image of 1024 px, and for 14 frames
        # of 1088x1920 px, encoded frame by frame. The upsampler begins as the model of images.
        ModelConfig("movie-gen-t2i-7b", 26, 4096, 32, 11008, MOVIE_GEN_ENCODERS, position_lengths=(1, 64, 64)),
        ModelConfig(
            "movie-gen-upsampler-7b",
            26,
            4096,
            32,
            11008,
            MOVIE_GEN_ENCODERS,
            position_lengths=(14, 68, 120),
            latent_conditions=(LatentCondition(LOW_RESOLUTION, 16),),
        ),
        ModelConfig("tiny", 2, 48, 6, 96, _TINY_ENCODERS, channels=4, position_lengths=(6, 6, 6)),
        ModelConfig("tiny-video", 4, 192, 6, 512, (Encoder("bytes", 64, 48),), position_lengths=(4, 16, 16)),
    )
}

# Latent (T, H, W) at which a preset is usually run: 256 frames of 768x768 px; 3.6.2; an image of 1024 px; 14 frames
# of 1088x1920 px; tests; 16 frames of 128x128 px.
USUAL_LATENTS: dict[str, tuple[int, int, int]] = {
    "movie-gen-30b": (32, 96, 96),
    "movie-gen-5b": (16, 24, 44),
    "movie-gen-t2i-7b": (1, 128, 128),
    "movie-gen-upsampler-7b": (14, 136, 240),
    "tiny": (3, 4, 12),
    "tiny-video": (2, 16, 16),
}


def preset(name: str) -> ModelConfig:
    """Raises CinemeshError naming the nearest preset when ``name`` is unknown."""
    if name not in PRESETS:
        raise CinemeshError(f"unknown model {name!r}", remedy=did_you_mean(name, PRESETS))
    return PRESETS[name]
