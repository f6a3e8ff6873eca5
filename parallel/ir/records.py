"""The records of a step: ``Op``s over named ``Buffer``s (torch-free).

They carry facts: where a record stands (``Place``), which part of a whole it makes (``Slice``), what it sends and
waits for (``Collective``, ``Wait``, ``Fused``), what a buffer is for (``BufferKind``, ``Holds``). Names tell records
apart, for people and as keys; nothing reads a meaning out of one.

[Note: collectives] A collective is two records, issue and wait. Only the wait may read what was issued; its output is
the same storage under its final name. Inputs and outputs live until the wait. So it is with a copy of a whole storage
from one ``Space`` to another (``Transfer``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

from .layout import Axes, Placement

COMPUTE_LANE = "compute"
WAIT = "wait"  # the kind of a record that waits for a collective
MARK = "mark"  # the kind of a record that tells a watchdog how far the step is (marks.py)


class Phase(StrEnum):
    """What a stretch of a step is there for."""

    WEIGHTS = "weights"  # cast and gather them
    FORWARD = "forward"
    GRADIENT = "gradient"  # make room for a unit's gradient
    BACKWARD = "backward"
    UPDATE = "update"  # reduce what is reduced once, norm, AdamW


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands in a step; None: not in a micro-batch, in no block, beside no unit.

    ``unit`` is the unit whose weights the records here read, or whose gradient they make. ``title``: for people.
    """

    phase: Phase = Phase.WEIGHTS
    micro_batch: int | None = None
    block: int | None = None
    unit: str | None = None
    title: str = field(default="", compare=False)

    @property
    def alike(self) -> str:
        """The title under which the same place of all blocks and micro-batches is counted together."""
        return self.title if self.block is None else f"blocks.*.{self.phase}"


NOWHERE = Place()


class SliceOf(Enum):
    """Along what a whole is taken in parts; the value marks the parts' names."""

    HEADS = "h"  # ``kv_slices``
    KEYS = "c"  # ``kv_chunks``
    TOKENS = "t"  # ``tp_slices``


@dataclass(frozen=True, slots=True)
class Slice:
    """Part ``index`` of what is made in parts."""

    of: SliceOf
    index: int

    def __str__(self) -> str:
        return f".{self.of.value}{self.index}"


class BufferKind(Enum):
    """How long a storage lives."""

    INPUT = "input"  # filled before a step
    STATE = "state"  # persists from step to step
    TEMPORARY = "temporary"  # from its first write to its last read
    WORKSPACE = "workspace"  # persists, holds nothing between records


class Space(StrEnum):
    """Where a storage lies."""

    DEVICE = "device"
    HOST = "host"


# The lanes of the link between them, one each way, by where a copy goes; a copy is of the kind that its lane is called.
HOST_LANES = {Space.HOST: "to_host", Space.DEVICE: "from_host"}


class Holds(Enum):
    """What a storage that is sized by units is for; everything else are values of the computation."""

    MASTER = "master weights"
    MOMENT = "moment"
    EMA = "EMA"
    GRADIENT = "gradient shard"
    WEIGHTS = "weight shard"
    FROZEN = "frozen weight shard"
    GATHERED_UNIT = "gathered unit"
    UNIT_GRADIENT = "unit gradient"
    VALUES = "values"


@dataclass(slots=True)
class Buffer:
    """Storage, or a view of it. ``offset`` counts local elements from the start of ``base``.

    ``strides``: local, in elements, of a view that is not contiguous (a slice of heads); None: C order.
    ``role``: what it is within its place, alike in all blocks and for all slices of a whole: what a plan keeps.
    ``unit``: of a gathered unit or a unit's gradient, which. ``place``: where it is made. ``clone_of``: the buffer
    whose value it holds again.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement
    kind: BufferKind = BufferKind.TEMPORARY
    base: str | None = None
    offset: int = 0
    strides: tuple[int, ...] | None = None
    role: str = ""
    holds: Holds = Holds.VALUES
    unit: str | None = None
    place: Place = NOWHERE
    clone_of: str | None = None
    space: Space = Space.DEVICE


@dataclass(frozen=True, slots=True)
class Collective:
    """Of an issue: over which axes, and the dim that it gathers or scatters."""

    axes: Axes
    dim: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Of the issue of a copy between spaces: where it goes. No mesh axis takes part."""

    to: Space
    axes: Axes = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """Of a wait: the record that issued its collective, or its copy to the space ``to``."""

    issue: str
    axes: Axes = ()
    dim: int = 0
    to: Space | None = None


@dataclass(frozen=True, slots=True)
class Fused:
    """Of a fused record (``fuse_tp.py``): the records that it stands for, in the order in which they would run."""

    axes: Axes
    dim: int
    parts: tuple[Op, ...]


@dataclass(slots=True)
class Op:
    """One record. ``attrs`` are what its kernel is called with; ``comm`` is None for compute.

    ``of`` names the forward op that a backward record differentiates, ``clone_of`` the one that it makes again.
    ``role``: what it makes, alike in all blocks and for all slices. ``before``: of a mark, the position of the record
    that it stands before.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    comm: Collective | Transfer | Wait | Fused | None = None
    place: Place = NOWHERE
    of: str | None = None
    clone_of: str | None = None
    role: str = ""
    slice: Slice | None = None
    before: int | None = None

    @property
    def clone(self) -> bool:
        """Whether it makes again in backward what forward did not keep."""
        return self.clone_of is not None

    @property
    def axes(self) -> Axes:
        """Whose link it uses; none for compute."""
        return self.comm.axes if self.comm else ()

    @property
    def lane(self) -> str:
        """``compute``, or the link that it uses: that of axes, as ``dp_shard*cp``, or one way of the host's."""
        if (to := self.to) is not None:
            return HOST_LANES[to]
        return lane_name(self.comm.axes) if self.comm else COMPUTE_LANE

    @property
    def to(self) -> Space | None:
        """Of a copy between spaces, and of its wait: where it goes."""
        return self.comm.to if isinstance(self.comm, (Transfer, Wait)) else None

    @property
    def label(self) -> str:
        """What it makes, and of which slice: how a record is called within its place."""
        return f"{self.role}{self.slice or ''}"

    @property
    def is_issue(self) -> bool:
        """The start of a collective, or of a copy between spaces; a fused record is none."""
        return isinstance(self.comm, (Collective, Transfer))

    @property
    def is_wait(self) -> bool:
        return isinstance(self.comm, Wait)

    @property
    def waits_for(self) -> str:
        """Of a wait: the name of its issue."""
        assert isinstance(self.comm, Wait), f"{self.name} is no wait"
        return self.comm.issue

    @property
    def parts(self) -> tuple[Op, ...]:
        """The records that a fused one stands for, in the order in which they would run; else itself."""
        return self.comm.parts if isinstance(self.comm, Fused) else (self,)

    @property
    def collective(self) -> Op:
        """The collective's issue: itself, or that within a fused record."""
        return self if self.is_issue else next(part for part in self.parts if part.is_issue)


Listed = TypeVar("Listed", Buffer, Op)
_FACTS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    kind: attrgetter(*[f.name for f in fields(kind)]) for kind in (Buffer, Op)
}


def altered(record: Listed, **facts: Any) -> Listed:
    """A buffer or a record with other facts: ``dataclasses.replace`` in half its time, since passes make thousands."""
    made = type(record)(*_FACTS[type(record)](record))
    for name, value in facts.items():
        setattr(made, name, value)
    return made


@dataclass(frozen=True, slots=True)
class Input:
    """What is filled before a step: ``buffer`` holds the ``name`` of a micro-batch's samples, or of the whole step."""

    name: str
    micro_batch: int | None
    buffer: str


@cache
def lane_name(axes: Axes) -> str:
    """As ``dp_shard*cp``: how a group of axes, and the link that it uses, is called."""
    return "*".join(axes)
