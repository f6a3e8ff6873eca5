"""Layout: where the elements of every parameter lie in flat shards, and what two layouts share (torch-free).

A parameter of global shape [..., split, ...] is looked at as rows x columns, the dims before the one that tp splits as
rows: a tp rank holds some columns of all rows. A run of its elements in a flat shard is then at most three boxes:

    columns of one tp rank       . . . x x       the end of a row
                                 x x x x x       whole rows
                                 x x . . .       the beginning of a row

The boxes of a wanted run and of a run in a file meet in boxes: strided copies from one flat buffer to another.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ....parallel.ir.units import Units, communicator_order

Coordinates = dict[str, int]  # on every axis of SHARDING
SHARDING = ("tp", "cp", "dp_shard")  # axes that split the states; over dp_replicate they are the same


@dataclass(frozen=True)
class FlatParameter:
    """One parameter in its unit: its elements, of one tp rank, lie in C order from element ``offset`` on.

    ``shape`` is global; ``tp_dim`` is the dim that tp splits, None where each tp rank has all of it.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    offset: int

    @cached_property
    def rows(self) -> int:
        return math.prod(self.shape[: self.tp_dim or 0])

    @cached_property
    def columns(self) -> int:
        return math.prod(self.shape[self.tp_dim or 0 :])


@dataclass(frozen=True)
class FlatUnit:
    """``elements`` of one tp rank, padding too, split evenly over ``axes`` (outer to inner).

    A rank's shard of it lies at ``position`` of its flat buffer.
    """

    name: str
    elements: int
    axes: tuple[str, ...]
    position: int
    parameters: tuple[FlatParameter, ...]


class Box(NamedTuple):
    """Rows and columns of a parameter; element (row, column) lies at ``origin + row * stride + column``."""

    top: int
    bottom: int
    left: int
    right: int
    origin: int
    stride: int


class Copy(NamedTuple):
    """``rows`` x ``columns`` elements from one flat buffer to another: where they begin, and from row to row."""

    source: int
    source_stride: int
    target: int
    target_stride: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a parameter's part at tp index ``tp``, from ``position`` of a buffer on.

    ``columns`` are those of one tp rank.
    """

    parameter: FlatParameter
    tp: int
    columns: int
    start: int
    stop: int
    position: int

    def within(self, first: int, last: int) -> Piece | None:
        """What of it lies in elements ``first`` to ``last`` of the buffer, its position counted from ``first``."""
        start, stop = max(self.position, first), min(self.position + self.stop - self.start, last)
        if start >= stop:
            return None
        moved = self.start - self.position
        return replace(self, start=start + moved, stop=stop + moved, position=start - first)

    def boxes(self) -> Iterator[Box]:
        """At most three, which tile it in order."""
        (top, left), (bottom, right) = divmod(self.start, self.columns), divmod(self.stop, self.columns)
        first = self.tp * self.columns
        origin = self.position - self.start - first

        def box(top: int, bottom: int, left: int, right: int) -> Box:
            return Box(top, bottom, first + left, first + right, origin, self.columns)

        if top == bottom:
            yield box(top, top + 1, left, right)
            return
        if left:
            yield box(top, top + 1, left, self.columns)
            top += 1
        if top < bottom:
            yield box(top, bottom, 0, self.columns)
        if right:
            yield box(bottom, bottom + 1, 0, right)

    def copies_to(self, wanted: Piece) -> Iterator[Copy]:
        """What brings all that both hold from here to there."""
        for a in self.boxes():
            for b in wanted.boxes():
                top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
                left, right = max(a.left, b.left), min(a.right, b.right)
                if top < bottom and left < right:
                    source, target = (box.origin + top * box.stride + left for box in (a, b))
                    yield Copy(source, a.stride, target, b.stride, bottom - top, right - left)


@dataclass(frozen=True)
class Layout:
    """All units over ``degrees``, the size of every axis of SHARDING."""

    degrees: Coordinates
    units: tuple[FlatUnit, ...]

    @classmethod
    def of(cls, units: Units) -> Layout:
        """As the ranks of a plan hold it."""
        plan = units.plan
        return cls(
            {axis: plan.size(axis) for axis in SHARDING},
            tuple(
                FlatUnit(
                    unit.name,
                    unit.elements,
                    communicator_order(plan, unit.axes),
                    unit.flat_offset,
                    tuple(
                        FlatParameter(s.parameter.name, s.parameter.shape, s.parameter.tp_dim, s.offset)
                        for s in unit.slots
                    ),
                )
                for unit in units.units
            ),
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes by parameter."""
        return {parameter.name: parameter.shape for unit in self.units for parameter in unit.parameters}

    def of_parameters(self, names: Collection[str]) -> Layout:
        """The same with these parameters alone; where they lie does not change."""
        units = (
            replace(unit, parameters=tuple(each for each in unit.parameters if each.name in names))
            for unit in self.units
        )
        return replace(self, units=tuple(units))

    @cached_property
    def flat_elements(self) -> int:
        """Of a rank's flat buffer."""
        return max(unit.position + self.shard_elements(unit) for unit in self.units)

    def shard_elements(self, unit: FlatUnit) -> int:
        return unit.elements // math.prod(self.degrees[axis] for axis in unit.axes)

    def columns(self, unit: FlatUnit, parameter: FlatParameter) -> int:
        """Of one tp rank."""
        return parameter.columns if "tp" in unit.axes else parameter.columns // self.degrees["tp"]

    def runs(self, at: Coordinates) -> Iterator[Piece]:
        """What the flat shard at these coordinates holds."""
        for unit in self.units:
            for parameter in unit.parameters:
                if (run := self._run(unit, parameter, at)) is not None:
                    yield run

    def _run(self, unit: FlatUnit, parameter: FlatParameter, at: Coordinates) -> Piece | None:
        size, index = self.shard_elements(unit), 0
        for axis in unit.axes:
            index = index * self.degrees[axis] + at[axis]
        columns, begin = self.columns(unit, parameter), index * size - parameter.offset
        start, stop = max(0, begin), min(parameter.rows * columns, begin + size)
        if start >= stop:
            return None
        return Piece(
            parameter, 0 if "tp" in unit.axes else at["tp"], columns, start, stop, unit.position + start - begin
        )

    @cached_property
    def _parameters(self) -> dict[str, tuple[FlatUnit, FlatParameter]]:
        return {parameter.name: (unit, parameter) for unit in self.units for parameter in unit.parameters}

    def whole(self, name: str) -> Piece:
        """A parameter of one tp rank, in a buffer of its own."""
        _, parameter = self._parameters[name]
        return Piece(parameter, 0, parameter.columns, 0, parameter.rows * parameter.columns, 0)

    def holders(self, wanted: Piece) -> Iterator[tuple[Coordinates, Piece]]:
        """Runs of this layout that hold elements of a run of another: where, and in whole flat shards there."""
        unit, parameter = self._parameters[wanted.parameter.name]
        columns, size = self.columns(unit, parameter), self.shard_elements(unit)
        found: set[tuple[int, int]] = set()
        for box in wanted.boxes():
            for tp in range(box.left // columns, (box.right - 1) // columns + 1):
                left, right = max(box.left - tp * columns, 0), min(box.right - tp * columns, columns)
                begin = parameter.offset + box.top * columns + left
                end = parameter.offset + (box.bottom - 1) * columns + right
                found |= {(tp, index) for index in range(begin // size, (end - 1) // size + 1)}
        for tp, index in sorted(found):
            at = dict.fromkeys(SHARDING, 0) | {"tp": tp}
            for axis in reversed(unit.axes):
                index, at[axis] = divmod(index, self.degrees[axis])
            run = self._run(unit, parameter, at)
            assert run is not None
            yield at, run
