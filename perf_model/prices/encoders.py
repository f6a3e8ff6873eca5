"""Frozen text encoders in the training loop: bytes and seconds, replicated or FSDP-only (torch-free).

Movie Gen A.2: ByT5 and MetaCLIP replicated on every GPU, UL2 FSDP-only across the data ranks of each TP rank; the
autoencoder is not in the loop (latents are cached). Every rank of a model-parallel group encodes the same captions.
Parameter counts are arithmetic on published shapes (embedding included), since the paper gives none.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...parallel.ir.plan import Plan
from .models import PriceModels
from .network import group_of

WEIGHT_BYTES = 2  # bf16


@dataclass(frozen=True)
class FrozenEncoder:
    """``layers`` equal layers of ``layer_parameters``, and an embedding table."""

    name: str
    layers: int
    layer_parameters: int
    embedding_parameters: int

    @property
    def bytes(self) -> int:
        return WEIGHT_BYTES * (self.layers * self.layer_parameters + self.embedding_parameters)


FROZEN = (
    # google/ul2, encoder half: width 4096, gated FFN 16384, 32 layers, vocabulary 32,128
    FrozenEncoder("ul2", 32, 4 * 4096 * 4096 + 3 * 4096 * 16384, 32128 * 4096),
    # MetaCLIP with a text tower of width 1280 (the width in Fig. 8): 32 layers, plain FFN 4x, vocabulary 49,408
    FrozenEncoder("metaclip", 32, 12 * 1280 * 1280, 49408 * 1280),
    # google/byt5-small, encoder: width 1472, 6 heads of 64, gated FFN 3584, 12 layers, vocabulary 384
    FrozenEncoder("byt5", 12, 4 * 1472 * 384 + 3 * 1472 * 3584, 384 * 1472),
)


@dataclass(frozen=True)
class FrozenCost:
    """``sharded`` names the encoders that are FSDP-only; the others are replicated."""

    bytes: int
    seconds: float
    sharded: tuple[str, ...]


def frozen_options(plan: Plan, tokens: dict[str, int], samples: int, models: PriceModels) -> list[FrozenCost]:
    """Ways to hold the encoders, the fastest first: from all replicated to all FSDP-only, the largest sharded first.

    ``tokens`` of each encoder for one sample; ``samples`` of one data rank in one step. A sharded encoder gathers its
    next layer while it computes this one, and holds two.
    """
    group = group_of(models.cluster, plan, ("dp_shard",))
    options: list[FrozenCost] = []
    by_size = sorted(FROZEN, key=lambda encoder: -encoder.bytes)
    for count in range(len(by_size) + 1):
        bytes_, seconds = 0, 0.0
        for i, encoder in enumerate(by_size):
            rows = tokens.get(encoder.name, 0) * samples
            # A layer's products, as one matmul with as many weights.
            width = 4096
            layer_s = models.compute.matmul_s(max(rows, 1), encoder.layer_parameters // width, width, "bfloat16")
            if i < count and plan.dp_shard > 1:
                layer = WEIGHT_BYTES * encoder.layer_parameters
                gather_s = models.network.collective("all_gather", layer, group).seconds
                bytes_ += encoder.bytes // plan.dp_shard + 2 * layer
                seconds += gather_s + encoder.layers * max(layer_s, gather_s)
            else:
                bytes_ += encoder.bytes
                seconds += encoder.layers * layer_s
        options.append(FrozenCost(bytes_, seconds, tuple(e.name for e in by_size[:count])))
    return sorted(options, key=lambda option: (option.seconds, option.bytes))
