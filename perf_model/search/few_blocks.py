"""The program of a few blocks, built and checked once for all degrees (torch-free)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from ...model.config import ModelConfig, block_unit
from ...model.inputs import BatchShape
from ...model.step import build_step, unit_layout
from ...parallel.ir.plan import Plan
from ...parallel.ir.units import Units

BLOCKS = 3  # of the shallow program, and one for each unit prefetched: lanes fill in the first, run dry in the last


def canonical(plan: Plan) -> Plan:
    """The plan of the shallow program that serves this one: two replicas, shard groups of one or of two ranks.

    A collective over one rank costs nothing, so more ranks than the plan has change no price; but a unit that is never
    gathered has other records than one that is.
    """
    alone = plan.dp_shard * plan.cp == 1
    return replace(plan, order=Plan().order).with_degrees(dp_shard=1 if alone else 2, dp_replicate=2)


@dataclass(frozen=True)
class Collective:
    """One collective of a shallow step.

    ``unit``: the unit whose size it has, or whose shard's size if it sums over replicas; "" the whole flat shard; None
    neither. ``split``: the other of tp and cp splits what it moves.
    """

    kind: str
    axes: tuple[str, ...]
    communicator: str
    bytes: int
    unit: str | None
    width: int
    split: bool

    def payload(self, units: Units, flat_elements: int) -> int:
        """Bytes under another shard group."""
        if self.unit is None:
            return self.bytes
        if not self.unit:
            return flat_elements * self.width
        unit = units.by_name[self.unit]
        return (unit.shard_elements if self.axes == ("dp_replicate",) else unit.elements) * self.width


class Shallow:
    """The program of a few blocks, built and checked once for all degrees.

    Shapes are global and placements typed, so another tp or cp changes the local size of every buffer and the layout of
    the flat units, but no record.
    """

    def __init__(self, config: ModelConfig, plan: Plan, batch: BatchShape, blocks: int = 0) -> None:
        self.config, self.batch = config, batch
        self.plan = canonical(plan)
        self.blocks = min(config.layers, blocks or BLOCKS + plan.prefetch)
        self.model = replace(config, layers=self.blocks)
        self.program = build_step(self.model, self.plan, batch)
        self.units = unit_layout(self.model, self.plan)
        self._units: dict[int, Units] = {}

    def on(self, plan: Plan) -> Shallow:
        """The same program under other degrees of tp and cp, with the flat units laid out for them."""
        plan = canonical(plan)
        if plan.data_ranks != self.plan.data_ranks:
            raise ValueError(f"a program of {self.plan.data_ranks} data ranks cannot serve {plan.data_ranks}")
        other = copy.copy(self)
        other.plan, other.units, other._units = plan, unit_layout(self.model, plan), {}
        shapes: dict[tuple[int, ...], tuple[int, int]] = {
            (self.units.ranks, self.units.flat_elements): (other.units.ranks, other.units.flat_elements)
        }
        for ours, theirs in zip(self.units.units, other.units.units, strict=True):
            tp = (self.plan.tp, plan.tp) if ours.tp_sharded else (1, 1)
            shapes[tp[0], ours.elements] = (tp[1], theirs.elements)
        built = self.program
        buffers = {
            name: replace(buffer, shape=shapes[buffer.shape]) if buffer.shape in shapes else buffer
            for name, buffer in built.buffers.items()
        }
        other.program = replace(built, plan=plan, buffers=buffers)
        return other

    @property
    def more(self) -> int:
        """Blocks of the deep model that the shallow one leaves out."""
        return self.config.layers - self.blocks

    def units_of(self, plan: Plan) -> Units:
        """The shallow model's units under another shard group."""
        if plan.dp_shard not in self._units:
            self._units[plan.dp_shard] = self.units.over(plan)
        return self._units[plan.dp_shard]

    def flat_elements(self, plan: Plan) -> int:
        """Elements of a rank's flat shard of the deep model."""
        units = self.units_of(plan)
        return units.flat_elements + self.more * units.by_name[block_unit(0)].shard_elements
