"""Frozen text encoders in the training loop: bytes and seconds, replicated or in shards (torch-free).

Movie Gen A.2: ByT5 and MetaCLIP replicated on every GPU, UL2 FSDP-only across the data ranks of each TP rank; the
autoencoder is not in the loop (latents are cached). They run between two steps, so all of their time is exposed, as
``launch/training/captions.py`` and ``parallel/runtime/frozen_layers.py`` do it:

    a turn takes the captions of ``turn_steps`` steps, each by itself (of full length here: the rest is not run)
    in shards, the gather of unit k + 1 flies while unit k computes; the first one's is waited for

Every rank of a model-parallel group encodes the same captions. Parameter counts of ``FROZEN`` are arithmetic on
published shapes (embedding included), since the paper gives none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...model.config import ModelConfig
from ...parallel.ir.frozen_layers import GATHERS, TURN_STEPS, FrozenLayers, sharing_ranks
from ...parallel.ir.layout import FSDP
from ...parallel.ir.plan import Plan
from .models import PriceModels
from .network import group_of

WEIGHT_BYTES = 2  # bf16
EMBEDDING_BYTES = 4  # float32, until they are loaded
WIDTH = 4096  # of the matmul as which a layer's products are priced: as many weights, in one


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder by its weights. ``width`` and ``tokens`` of what it makes of a caption; 0 tokens: as the model says.

    ``sharded``: whether its weights are in shards; None: whichever is faster and fits.
    """

    name: str
    layers: FrozenLayers
    width: int
    tokens: int = 0
    sharded: bool | None = None

    @property
    def bytes(self) -> int:
        return self.layers.bytes


def _published(name: str, layers: int, layer: int, vocabulary: int, width: int) -> FrozenEncoder:
    """``layers`` equal layers of ``layer`` parameters, and an embedding table."""
    return FrozenEncoder(name, FrozenLayers((vocabulary * width, *[layer] * layers), 0, WEIGHT_BYTES), width)


FROZEN = (
    # google/ul2, encoder half: width 4096, gated FFN 16384, 32 layers, vocabulary 32,128
    _published("ul2", 32, 4 * 4096 * 4096 + 3 * 4096 * 16384, 32128, 4096),
    # MetaCLIP with a text tower of width 1280 (the width in Fig. 8): 32 layers, plain FFN 4x, vocabulary 49,408
    _published("metaclip", 32, 12 * 1280 * 1280, 49408, 1280),
    # google/byt5-small, encoder: width 1472, 6 heads of 64, gated FFN 3584, 12 layers, vocabulary 384
    _published("byt5", 12, 4 * 1472 * 384 + 3 * 1472 * 3584, 384, 1472),
)


@dataclass(frozen=True)
class LoopEncoders:
    """Those that run between the steps of a job, for the captions of ``turn_steps`` steps at once."""

    encoders: tuple[FrozenEncoder, ...]
    turn_steps: int = TURN_STEPS

    @classmethod
    def of_paper(cls, config: ModelConfig) -> LoopEncoders:
        """Movie Gen's three; a caption has as many tokens of each as the model takes."""
        tokens = {encoder.name: encoder.tokens for encoder in config.encoders}
        return cls(tuple(replace(encoder, tokens=tokens.get(encoder.name, 0)) for encoder in FROZEN))


@dataclass(frozen=True)
class FrozenCost:
    """Of one step. ``sharded`` names the encoders that are in shards; the others are replicated."""

    bytes: int
    seconds: float
    sharded: tuple[str, ...]


def frozen_options(
    plan: Plan,
    loop: LoopEncoders,
    samples: int,
    models: PriceModels,
) -> list[FrozenCost]:
    """Ways to hold the encoders, the fastest first: from all replicated to all in shards, the largest sharded first.

    ``samples`` of one data rank in one step. Of those that say how they are held there is one way.
    """
    by_size = sorted(loop.encoders, key=lambda encoder: -encoder.bytes)
    free = [encoder.name for encoder in by_size if encoder.sharded is None]
    held = {encoder.name for encoder in by_size if encoder.sharded}
    ways = [held | set(free[:count]) for count in range(len(free) + 1)]
    options = [_cost(plan, by_size, way, samples, models, loop.turn_steps) for way in ways]
    return sorted(options, key=lambda option: (option.seconds, option.bytes))


def _cost(
    plan: Plan,
    encoders: Sequence[FrozenEncoder],
    sharded: set[str],
    samples: int,
    models: PriceModels,
    turn_steps: int,
) -> FrozenCost:
    bytes_, seconds = 0, 0.0
    for encoder in encoders:
        ranks = sharing_ranks(plan) if encoder.name in sharded else 1
        bytes_ += encoder.layers.held_bytes(ranks)
        bytes_ += EMBEDDING_BYTES * encoder.tokens * encoder.width * samples * turn_steps
        seconds += turn_s(plan, encoder, samples * turn_steps, ranks, models) / turn_steps
    return FrozenCost(bytes_, seconds, tuple(e.name for e in encoders if e.name in sharded))


def turn_s(plan: Plan, encoder: FrozenEncoder, captions: int, ranks: int, models: PriceModels) -> float:
    """Seconds in which an encoder, shared by ``ranks``, takes so many captions through all of its units."""
    layers, tokens = encoder.layers, max(encoder.tokens, 1)
    dtype = {2: "bfloat16", 4: "float32"}[layers.element_bytes]
    products = [0.0] + [models.compute.matmul_s(tokens, size // WIDTH or 1, WIDTH, dtype) for size in layers.units[1:]]
    computes = [captions * seconds for seconds in products]  # a table is looked up
    if ranks == 1:
        return sum(computes)
    group = group_of(models.cluster, plan, FSDP)
    sizes = [layers.gathered_bytes(unit, ranks) for unit in range(len(layers.units))]
    gathers = [models.network.collective(GATHERS, size, group).seconds for size in sizes]
    return gathers[0] + sum(max(pair) for pair in zip(computes, [*gathers[1:], 0.0], strict=True))
