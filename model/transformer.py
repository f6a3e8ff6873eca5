"""The forward pass of the whole model as program records: of a training step, and of the sampler (torch-free)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from ..parallel.ir.builder import Builder
from ..parallel.ir.records import Buffer, Phase, Place
from ..parallel.layers.sharded import ShardedUnits
from .backbone import Block
from .block_parts import Weights
from .config import CONDITIONING_UNIT, REPLICATED_UNIT, ModelConfig, block_unit
from .ends import Embedding, FinalLayer

Given = tuple[Buffer, Buffer, dict[str, Buffer]]  # x_t [T, B, P], t [B], and conditions by name


class Transformer:
    """Embedding, blocks and final layer on one batch, each unit gathered before it; remembered for backward."""

    def __init__(
        self, b: Builder, c: ModelConfig, units: ShardedUnits, latent: tuple[int, int, int], number: int | None = None
    ) -> None:
        """``latent``: (T, H, W) of a sample. ``number``: of the micro-batch, if it is one of a step."""
        self.b, self.c, self.units, self.number = b, c, units, number
        self.latent = latent

    def scope(self, name: str, phase: Phase, unit: str, block: int | None = None) -> AbstractContextManager[None]:
        """A stretch of this pass, or of its backward."""
        return self.b.scope(f"{name}.{phase}", Place(phase, self.number, block, unit))

    def velocity_of(self, once: Weights, given: Callable[[], Given]) -> Buffer:
        """The prediction [T, B, P]. ``once``: weights of the replicated unit. ``given``: asked as embedding begins."""
        b, c = self.b, self.c
        with self.scope("conditioning", Phase.WEIGHTS, CONDITIONING_UNIT):
            self.conditioning = self.units.gather(CONDITIONING_UNIT)
        with self.scope("embedding", Phase.FORWARD, CONDITIONING_UNIT):
            x_t, t, conditions = given()
            self.embedding = Embedding(b, c, c.grid(self.latent))
            x, self.cond = self.embedding.forward({**once, **self.conditioning}, x_t, t, conditions)
            if c.lora is not None:  # its gradient is made and left: so all blocks are alike
                b.parameter(x)
        self.blocks: list[tuple[Block, Weights]] = []
        for layer in range(c.layers):
            unit = block_unit(layer)
            with self.scope(unit, Phase.WEIGHTS, unit, layer):
                weights = self.units.gather(unit)
            with self.scope(unit, Phase.FORWARD, unit, layer):
                block = Block(b, c, unit)
                x = block.forward({**once, **weights}, x, self.cond)
            self.blocks.append((block, weights))
        with self.scope("final", Phase.FORWARD, REPLICATED_UNIT):
            self.final = FinalLayer(b, c)
            return self.final.forward(once, x, self.cond)
