"""Units: which parameters are gathered and freed together, and where each lies in the flat buffers (torch-free).

Every unit is one flat buffer, so gathered weights are views without a copy, weight gradients are written straight into
the flat gradient, and one collective moves a unit. TP-sharded weights form units over ``fsdp`` (dp_shard outer, cp
inner); all TP-replicated parameters form ONE unit over ``replicated_unit`` (fsdp x tp).

    unit, local to one tp rank:   | W_q | gap | W_kv | gap | ... | tail padding |     elements, a multiple of shards
    a rank's flat shard:          | conditioning | blocks.0 | ... | blocks.N | replicated |   one shard of each unit

A unit is trained or frozen as a whole, and either kind has a flat shard of its own: what is frozen has no gradient, no
moments and no average, and its shard no more than the weights in the compute dtype. Parameters of one name of a unit of
which some are trained and some are not are two units.

Every parameter and every shard starts at a multiple of ALIGN elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    ``in_block``: of a parameter that every block has, its name without the block. ``trained``: or frozen.
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
    trained: bool = True

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
    def trained(self) -> bool:
        return self.slots[0].parameter.trained

    @property
    def place(self) -> str:
        """The unit that its parameters are said to be in: of which it is the trained part, or the frozen one."""
        return self.slots[0].parameter.unit

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
    """All trained units of a model under a plan, and those that are ``frozen``, in a flat shard of their own.

    The replicated unit is last, so that one index splits decayed elements.
    """

    units: tuple[Unit, ...]
    plan: Plan
    frozen: tuple[Unit, ...] = ()

    @property
    def all(self) -> tuple[Unit, ...]:
        return (*self.frozen, *self.units)

    @cached_property
    def by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.all}

    @cached_property
    def at(self) -> dict[str, list[Unit]]:
        """By the name that parameters give: one unit, or the frozen part and the trained one."""
        places: dict[str, list[Unit]] = {}
        for unit in self.all:
            places.setdefault(unit.place, []).append(unit)
        return places

    @property
    def of_frozen(self) -> Units:
        """The frozen ones as a layout of their own."""
        return Units(self.frozen, self.plan)

    @property
    def flat_elements(self) -> int:
        """Elements of one rank's flat shard of everything that is trained."""
        return _flat_elements(self.units)

    @property
    def frozen_elements(self) -> int:
        """Of its flat shard of what is frozen."""
        return _flat_elements(self.frozen)

    @property
    def ranks(self) -> int:
        """Ranks over which everything is split once."""
        return self.plan.size(REPLICATED_AXES)

    def shard_index(self, unit: Unit, coordinates: dict[str, int]) -> int:
        """Which shard of ``unit`` the rank with these mesh coordinates holds."""
        return nested_index(self.plan, communicator_order(self.plan, unit.axes), coordinates)

    def over(self, plan: Plan) -> Units:
        """The same units over the shard group of another plan of the same tp."""
        units, frozen = (
            _split(((unit.name, unit.slots, unit.axes) for unit in kind), plan) for kind in (self.units, self.frozen)
        )
        return Units(units, plan, frozen)


def _flat_elements(units: tuple[Unit, ...]) -> int:
    return units[-1].flat_offset + units[-1].shard_elements if units else 0


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


def lay_out(parameters_by_unit: Mapping[str, Sequence[Parameter]], plan: Plan) -> Units:
    """Place every parameter. Units that hold TP-replicated parameters are split over ``replicated_unit``."""
    ordered = sorted(parameters_by_unit.items(), key=lambda item: item[1][0].tp_dim is None)
    kinds: dict[bool, list[tuple[str, tuple[Slot, ...], Axes]]] = {True: [], False: []}  # trained, frozen
    for place, all_rows in ordered:
        assert len({row.tp_dim is None for row in all_rows}) == 1, f"unit {place} mixes TP-sharded and TP-replicated"
        axes = REPLICATED_AXES if all_rows[0].tp_dim is None else FSDP
        for trained, units in kinds.items():
            rows = [row for row in all_rows if row.trained is trained]
            slots: list[Slot] = []
            offset = 0
            for row in sorted(rows, key=lambda row: not row.decay):
                elements = math.prod(row.local_shape(plan.tp))
                slots.append(Slot(row, offset, elements))
                offset = _up(offset + elements, ALIGN)
            if rows:
                name = place if len(rows) == len(all_rows) or not trained else f"{place}.trained"
                units.append((name, tuple(slots), axes))
    return Units(_split(kinds[True], plan), plan, _split(kinds[False], plan))


def _split(units: Iterable[tuple[str, tuple[Slot, ...], Axes]], plan: Plan) -> tuple[Unit, ...]:
    """Pad every unit (name, slots, axes) so that its ranks share it, and put their shards one behind the other."""
    made: list[Unit] = []
    flat = 0
    for name, slots, axes in units:
        shards = plan.size(axes)
        elements = _up(slots[-1].offset + slots[-1].elements, shards * ALIGN)
        made.append(Unit(name, slots, elements, shards, axes, flat))
        flat += made[-1].shard_elements
    return tuple(made)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
