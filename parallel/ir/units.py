"""Units: which parameters are gathered and freed together, and where each lies in the flat buffers (torch-free).

Every unit is one flat buffer, so gathered weights are views without a copy, weight gradients are written straight into
the flat gradient, and one collective moves a unit. TP-sharded weights form units over ``fsdp`` (dp_shard outer, cp
inner); all TP-replicated parameters form ONE unit over ``replicated_unit`` (fsdp x tp).

    unit, local to one tp rank:   | W_q | gap | W_kv | gap | ... | tail padding |     elements, a multiple of shards
    a rank's flat shard:          | conditioning | blocks.0 | ... | blocks.N | replicated |   one shard of each unit

Every parameter and every shard starts at a multiple of ALIGN elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .layout import FSDP, REPLICATED_AXES, Axes, Placement
from .plan import Plan

ALIGN = 128  # elements: 256 bytes in bf16, what wide loads and NCCL want


@dataclass(frozen=True)
class Parameter:
    """One row of the parameter table.

    ``shape`` is global. ``tp_dim`` is the dim split over tp (None: TP-replicated). ``unit`` names the FSDP unit.
    ``std`` is the initial standard deviation when ``init`` is normal. ``decay`` says whether AdamW decays it.
    ``in_block``: of a parameter that every block has, its name without the block.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    unit: str
    init: Literal["normal", "zeros", "ones"]
    std: float
    decay: bool
    part: str
    in_block: str = ""

    @property
    def role(self) -> str:
        """Its name, or what it is called in every block."""
        return self.in_block or self.name

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def placement(self) -> Placement:
        return Placement(tuple(("tp",) if dim == self.tp_dim else () for dim in range(len(self.shape))))

    def local_shape(self, tp: int) -> tuple[int, ...]:
        return tuple(size // tp if dim == self.tp_dim else size for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class Slot:
    """One parameter's place in its unit: ``elements`` (of one tp rank) from ``offset`` on."""

    parameter: Parameter
    offset: int
    elements: int


@dataclass(frozen=True)
class Unit:
    """``elements`` of one tp rank with padding, split into ``shards``; a rank's shard starts at ``flat_offset``."""

    name: str
    slots: tuple[Slot, ...]
    elements: int
    shards: int
    axes: Axes
    flat_offset: int

    @property
    def shard_elements(self) -> int:
        return self.elements // self.shards

    @property
    def tp_sharded(self) -> bool:
        return self.axes == FSDP

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the elements that belong to no parameter."""
        ends = [(slot.offset, slot.offset + slot.elements) for slot in self.slots] + [(self.elements, self.elements)]
        gaps: list[tuple[int, int]] = []
        position = 0
        for start, stop in ends:
            if start > position:
                gaps.append((position, start))
            position = stop
        return tuple(gaps)

    @property
    def decayed(self) -> int:
        """Elements before this one decay: parameters that decay come first in a unit."""
        return max((slot.offset + slot.elements for slot in self.slots if slot.parameter.decay), default=0)

    def overlaps(self, shard: int) -> Iterator[tuple[Slot, int, int, int]]:
        """(slot, start, stop, position) for every parameter that a shard holds a part of.

        ``start`` to ``stop`` are elements of the parameter as one tp rank sees it, flat in C order; ``position`` is
        where that part starts in the rank's whole flat buffer.
        """
        first = shard * self.shard_elements
        for slot in self.slots:
            start = max(slot.offset, first)
            stop = min(slot.offset + slot.elements, first + self.shard_elements)
            if start < stop:
                yield (
                    slot,
                    start - slot.offset,
                    stop - slot.offset,
                    self.flat_offset + start - first,
                )


@dataclass(frozen=True)
class Units:
    """All units of a model under a plan; the replicated unit is last, so that one index splits decayed elements."""

    units: tuple[Unit, ...]
    plan: Plan

    @cached_property
    def by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @property
    def flat_elements(self) -> int:
        """Elements of one rank's flat shard of everything."""
        last = self.units[-1]
        return last.flat_offset + last.shard_elements

    @property
    def ranks(self) -> int:
        """Ranks over which everything is split once."""
        return self.plan.size(REPLICATED_AXES)

    def shard_index(self, unit: Unit, coordinates: dict[str, int]) -> int:
        """Which shard of ``unit`` the rank with these mesh coordinates holds."""
        return nested_index(self.plan, communicator_order(self.plan, unit.axes), coordinates)

    def over(self, plan: Plan) -> Units:
        """The same units over the shard group of another plan of the same tp."""
        return _split(((unit.name, unit.slots, unit.axes) for unit in self.units), plan)


def nested_index(plan: Plan, axes: Axes, coordinates: dict[str, int]) -> int:
    """Position of a rank along ``axes``, outer to inner: which tokens or samples it holds."""
    index = 0
    for axis in axes:
        index = index * plan.size(axis) + coordinates[axis]
    return index


def communicator_order(plan: Plan, axes: Axes) -> Axes:
    """``axes`` from outermost to innermost in the job's rank order: how a communicator over them numbers its ranks.

    Shards of a flat unit follow it, since a communicator concatenates in that order whatever ``axes`` says.
    """
    return tuple(sorted(axes, key=plan.order.index, reverse=True))


def lay_out(parameters_by_unit: dict[str, Sequence[Parameter]], plan: Plan) -> Units:
    """Place every parameter. Units that hold TP-replicated parameters are split over ``replicated_unit``."""
    ordered = sorted(parameters_by_unit.items(), key=lambda item: item[1][0].tp_dim is None)
    units: list[tuple[str, tuple[Slot, ...], Axes]] = []
    for name, rows in ordered:
        assert len({row.tp_dim is None for row in rows}) == 1, f"unit {name} mixes TP-sharded and TP-replicated"
        axes = REPLICATED_AXES if rows[0].tp_dim is None else FSDP
        slots: list[Slot] = []
        offset = 0
        for row in sorted(rows, key=lambda row: not row.decay):
            elements = math.prod(row.local_shape(plan.tp))
            slots.append(Slot(row, offset, elements))
            offset = _up(offset + elements, ALIGN)
        units.append((name, tuple(slots), axes))
    return _split(units, plan)


def _split(units: Iterable[tuple[str, tuple[Slot, ...], Axes]], plan: Plan) -> Units:
    """Pad every unit (name, slots, axes) so that its ranks share it, and put their shards one behind the other."""
    made: list[Unit] = []
    flat = 0
    for name, slots, axes in units:
        shards = plan.size(axes)
        elements = _up(slots[-1].offset + slots[-1].elements, shards * ALIGN)
        made.append(Unit(name, slots, elements, shards, axes, flat))
        flat += made[-1].shard_elements
    return Units(tuple(made), plan)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
