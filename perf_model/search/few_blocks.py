"""The program of a few blocks, built and checked once for all degrees (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...model.config import ModelConfig, block_unit
from ...model.inputs import BatchShape
from ...model.step import build_step, unit_layout
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.units import Units

BLOCKS = 3  # of the program, and one for each unit prefetched: lanes fill in the first, run dry in the last


def canonical(plan: Plan) -> Plan:
    """The plan of the few-block program that serves this one: two replicas, shard groups of one or of two ranks.

    A collective over one rank costs nothing, so more ranks than the plan has change no price; but a unit that is never
    gathered has other records than one that is.
    """
    alone = plan.dp_shard * plan.cp == 1
    return replace(plan, order=Plan().order).with_degrees(dp_shard=1 if alone else 2, dp_replicate=2)


@dataclass(frozen=True, eq=False)
class FewBlocks:
    """The program of a few blocks of a model, before its passes.

    Shapes are global and placements typed, so another tp or cp changes the local size of every buffer and the layout of
    the flat units, but no record. ``units``: of the few blocks, under ``plan``.
    """

    config: ModelConfig
    batch: BatchShape
    plan: Plan
    blocks: int
    program: Program
    units: Units
    _units: dict[int, Units] = field(default_factory=dict, init=False, repr=False)  # by ranks of the shard group

    @classmethod
    def build(cls, config: ModelConfig, plan: Plan, batch: BatchShape, blocks: int = 0) -> FewBlocks:
        """``blocks``: as many as a plan's prefetch needs, if 0; never more than the model has."""
        plan, blocks = canonical(plan), min(config.layers, blocks or BLOCKS + plan.prefetch)
        model = replace(config, layers=blocks)
        return cls(config, batch, plan, blocks, build_step(model, plan, batch), unit_layout(model, plan))

    def on(self, plan: Plan) -> FewBlocks:
        """The same program under other degrees of tp and cp, with the flat units laid out for them."""
        plan = canonical(plan)
        if plan.data_ranks != self.plan.data_ranks:
            raise ValueError(f"a program of {self.plan.data_ranks} data ranks cannot serve {plan.data_ranks}")
        units = unit_layout(replace(self.config, layers=self.blocks), plan)
        shapes: dict[tuple[int, ...], tuple[int, int]] = {
            (self.units.ranks, self.units.flat_elements): (units.ranks, units.flat_elements)
        }
        for ours, theirs in zip(self.units.units, units.units, strict=True):
            tp = (self.plan.tp, plan.tp) if ours.tp_sharded else (1, 1)
            shapes[tp[0], ours.elements] = (tp[1], theirs.elements)
        buffers = {
            name: replace(buffer, shape=shapes[buffer.shape]) if buffer.shape in shapes else buffer
            for name, buffer in self.program.buffers.items()
        }
        return replace(self, plan=plan, program=replace(self.program, plan=plan, buffers=buffers), units=units)

    @property
    def more(self) -> int:
        """Blocks of the model that the program leaves out."""
        return self.config.layers - self.blocks

    def units_of(self, plan: Plan) -> Units:
        """The few blocks' units under another shard group."""
        if plan.dp_shard not in self._units:
            self._units[plan.dp_shard] = self.units.over(plan)
        return self._units[plan.dp_shard]

    def flat_elements(self, plan: Plan) -> int:
        """Elements of a rank's flat shard of the whole model."""
        units = self.units_of(plan)
        return units.flat_elements + self.more * units.by_name[block_unit(0)].shard_elements
