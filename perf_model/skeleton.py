"""Price a deep step from a shallow one: a few equal blocks are played until steady, the rest follow (torch-free).

The shallow program is built by the same builders as the deep one, with a few blocks instead of all. Every block adds
the same time to forward and to backward once the lanes are steady, and the same kept bytes. The size of the shard group
and the placement of axes on the network change prices, not records, so one shallow program serves all of them.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

from ..model.step import prepare
from ..parallel.communicators import GROUPS, communicator
from ..parallel.layout import Axes
from ..parallel.memory import lifetimes
from ..parallel.ops import DTYPE_BYTES, OPS
from ..parallel.plan import Plan
from ..parallel.program import Program
from ..parallel.units import Units
from .cluster import Cluster
from .compute import Compute
from .footprint import FLAT, UNIT, class_of
from .network import Cost, Group, Network, group_of, placed
from .shallow import Shallow, canonical
from .timeline import COMPUTE, ISSUE, WAIT, Record, Tape, Timeline, play, price

STEADY_BLOCKS = 6  # from here on two blocks in the middle must agree
STEADY = 1e-6  # relative difference of two blocks' times that counts as none
_BLOCK = re.compile(r"^(mb\d+)/blocks\.(\d+)\.(forward|backward)$")


@dataclass(frozen=True)
class Collective:
    """One collective of the shallow step.

    ``unit``: the unit whose size it has; "" the whole flat shard; None neither. ``split``: the other of tp and cp
    splits what it moves.
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
        return (units.by_name[self.unit].elements if self.unit else flat_elements) * self.width


Groups = dict[Axes, Group]
_AXES = tuple(dict.fromkeys(axes for axes, _ in GROUPS))


def groups_of(plan: Plan, cluster: Cluster, order: Axes = ()) -> Groups:
    """How every group of axes lies on the network, by the plan's rank order or another."""
    order = order or plan.order
    sizes = tuple(plan.size(axis) for axis in order)
    return {axes: placed(cluster, order, sizes, axes) for axes in _AXES if plan.size(axes) > 1}


class NotSteady(Exception):
    """Blocks of the shallow step differ in time: only the whole step can say."""


@dataclass(frozen=True)
class Priced:
    """A step priced from its skeleton: seconds of the whole, and of its compute alone."""

    step_s: float
    compute_s: float


class Skeleton:
    """A shallow program after its passes, with what is needed to price deep steps under any shard group and order."""

    def __init__(self, shallow: Shallow, plan: Plan, compute: Compute, cluster: Cluster) -> None:
        self.shallow = shallow
        self.plan = canonical(plan)
        self.blocks, self.more, self.units = shallow.blocks, shallow.more, shallow.units
        built = shallow.program
        self.program = prepare(Program(self.plan, built.buffers, built.ops, built.outputs, built.facts), backend="nccl")
        self.compute = compute
        self.cluster = cluster
        self._flat: list[int] = []  # records over the whole flat shard: their time follows its size
        self._collectives: list[tuple[int, Collective]] = []
        self._peaks: dict[int, int] = {}
        self._lanes: dict[object, tuple[float, float, float]] = {}

    # -- prices ---------------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> Tape:
        """The tape without its network: every collective free."""
        program, units = self.program, self.units
        tape = price(program, self.compute, None, self.cluster)
        by_elements = {unit.elements: unit.name for unit in units.units}
        flat = units.flat_elements
        for i, op in enumerate(program.ops):
            if op.kind == "wait":
                continue
            if op.kind in OPS:
                whole = (name for name in (*op.inputs, *op.outputs) if program.local_elements(name) == flat)
                if any(class_of(program, program.root(name)[0], set()) in FLAT for name in whole):
                    self._flat.append(i)
                continue
            payload, unit = program.payload_bytes(op), None
            width = DTYPE_BYTES[program.buffers[op.outputs[0]].dtype]
            if "dp_shard" in op.axes:
                unit = by_elements.get(payload // width)
            elif op.axes == ("dp_replicate",):
                unit = ""
            larger = max(op.inputs[0], op.outputs[0], key=program.bytes)
            dims = program.buffers[larger].placement.dims
            other = "cp" if op.axes == ("tp",) else "tp"
            split = any(other in axes for axes in dims)
            collective = Collective(op.kind, op.axes, communicator(op), payload, unit, width, split)
            self._collectives.append((i, collective))
        return tape

    def tape(self, plan: Plan, network: Network, cluster: Cluster) -> Tape:
        """Prices of the deep model's step under ``plan``, on the shallow program's records."""
        units, flat = self.shallow.units_of(plan), self.shallow.flat_elements(plan)
        base = self.base
        groups = {axes: group_of(cluster, plan, axes) for axes in {c.axes for _, c in self._collectives}}
        changed: dict[int, Record] = {}
        ratio = flat / self.units.flat_elements
        for i in self._flat:
            changed[i] = replace(base.records[i], seconds=base.records[i].seconds * ratio)
        for i, collective in self._collectives:
            cost = network.collective(collective.kind, collective.payload(units, flat), groups[collective.axes])
            changed[i] = Record(ISSUE, key=base.records[i].key, cost=cost)
        return base.with_records(changed)

    # -- time -----------------------------------------------------------------------------------------------------

    @cached_property
    def marks(self) -> dict[tuple[str, str], list[int]]:
        """First record of every block, by micro-batch and direction, in the order of execution."""
        marks: dict[tuple[str, str], dict[int, int]] = {}
        for i, op in enumerate(self.program.ops):
            if op.clone or op.kind not in OPS:
                continue
            found = _BLOCK.match(op.region)
            if found:
                micro_batch, block, direction = found.groups()
                marks.setdefault((micro_batch, direction), {}).setdefault(int(block), i)
        return {key: list(blocks.values()) for key, blocks in marks.items()}

    def step_s(self, timeline: Timeline) -> float:
        """The deep step's time from the shallow one's. Raises NotSteady where blocks do not agree."""
        total = timeline.step_s
        if self.more == 0:
            return total
        for (_, direction), starts in self.marks.items():
            begun = [timeline.start[i] for i in starts]
            each = [after - before for before, after in itertools.pairwise(begun)]
            at = self._middle(direction)
            if self.blocks >= STEADY_BLOCKS and abs(each[at] - each[at + 1]) > STEADY * each[at]:
                raise NotSteady(f"two blocks take {each[at]:.6g} s and {each[at + 1]:.6g} s")
            total += self.more * each[at]
        return total

    def _middle(self, direction: str) -> int:
        """The block whose time and records the blocks left out repeat.

        Lanes fill in the first blocks of either direction; they run dry in the last backward ones.
        """
        return self.blocks - 3 if direction == "forward" else min(2, (self.blocks - 1) // 2)

    def repeats(self, i: int) -> int:
        """How often a record of the shallow step stands in the deep one."""
        return 1 + (self.more if any(begin <= i < end for begin, end in self.period) else 0)

    @cached_property
    def period(self) -> list[tuple[int, int]]:
        """Records of one block, in every direction of every micro-batch, which the blocks left out repeat."""
        if not self.more:
            return []
        middles = ((starts, self._middle(direction)) for (_, direction), starts in self.marks.items())
        return [(starts[at], starts[at + 1]) for starts, at in middles]

    @cached_property
    def _compute_s(self) -> float:
        """Compute seconds of the deep step, without what runs over the flat shard."""
        return self.base.compute_s - self._flat_s + self.more * self._block_compute_s

    @cached_property
    def _flat_s(self) -> float:
        """Compute seconds over the shallow model's flat shard."""
        return sum(self.base.records[i].seconds for i in self._flat)

    @cached_property
    def _block_compute_s(self) -> float:
        """Compute seconds that one more block adds."""
        added = 0.0
        for begin, end in self.period:
            for i in range(begin, end):
                record = self.base.records[i]
                added += record.seconds if record.kind == COMPUTE else 0.0
        return added

    @cached_property
    def terms(self) -> dict[tuple[Collective, float], int]:
        """How often each collective stands in the deep step, by the compute seconds that can hide it.

        None between issue and wait: -1. More than any collective takes where another one of its communicator is in
        flight in the same window, so that no time is counted twice.
        """
        records = self.base.records
        waits = {record.key: i for i, record in enumerate(records) if record.kind == WAIT}
        passed = list(itertools.accumulate((r.seconds for r in records), initial=0.0))
        counts: dict[tuple[Collective, float], int] = {}
        last: dict[str, int] = {}
        for i, collective in self._collectives:
            wait = waits[i]
            window = passed[wait] - passed[i]
            if wait == i + 1:
                window = -1.0
            elif last.get(collective.communicator, -1) > i:
                window = math.inf
            else:
                last[collective.communicator] = wait
            key = (collective, window)
            counts[key] = counts.get(key, 0) + self.repeats(i)
        return counts

    def bound_s(self, plan: Plan, network: Network, groups: Groups) -> float:
        """A lower bound of the deep step, without playing it.

        Compute runs one record after the other. A collective in flight takes SMs or memory bandwidth from it; what
        runs longer than the compute between its issue and its wait is waited for.
        """
        ratio = self.shallow.flat_elements(plan) / self.units.flat_elements
        total = self._compute_s + self._flat_s * ratio
        longest = waited = 0.0
        for axes, group in groups.items():
            key = (axes, group, plan.dp_shard if "dp_shard" in axes or axes == ("dp_replicate",) else 0)
            found = self._lanes.get(key)
            if found is None:
                found = self._lanes[key] = self._lane(plan, network, axes, group)
            total += found[0]
            waited = max(waited, found[1])
            longest = max(longest, found[2])
        return max(total + waited, longest)

    def taken(self, cost: Cost) -> float:
        """The share of compute that a collective in flight takes at least, whatever runs beside it."""
        tape = self.base
        share = min(cost.sms / tape.sms, cost.memory_bytes_per_s / tape.memory_bytes_per_s)
        return min(share * tape.compute_slowdown, 1.0)

    def _lane(self, plan: Plan, network: Network, axes: Axes, group: Group) -> tuple[float, float, float]:
        """Least seconds of the collectives over one group of axes: added, waited for, and of the busiest communicator.

        What is added adds up over the lanes; what is waited for in one lane may be waited for in another as well.
        """
        units, flat = self.shallow.units_of(plan), self.shallow.flat_elements(plan)
        added = 0.0
        busy: dict[str, float] = {}
        waited: dict[str, float] = {}
        for (collective, window), times in self.terms.items():
            if collective.axes != axes:
                continue
            cost = network.collective(collective.kind, collective.payload(units, flat), group)
            name = collective.communicator
            busy[name] = busy.get(name, 0.0) + times * cost.seconds
            taken = cost.seconds * (1.0 if window < 0.0 else self.taken(cost))
            added += times * taken
            waited[name] = waited.get(name, 0.0) + times * max(0.0, cost.seconds - max(window, 0.0) - taken)
        return added, max(waited.values(), default=0.0), max(busy.values(), default=0.0)

    def price(self, plan: Plan, network: Network, cluster: Cluster) -> Priced:
        tape = self.tape(plan, network, cluster)
        timeline = play(tape)
        try:
            step_s = self.step_s(timeline)
        except NotSteady:
            shallow = self.shallow
            deep = Shallow(shallow.config, plan, shallow.batch, blocks=shallow.config.layers)
            return Skeleton(deep, plan, self.compute, cluster).price(plan, network, cluster)
        compute_s = tape.compute_s + self.more * self._block_compute_s
        return Priced(step_s, compute_s)

    # -- memory ---------------------------------------------------------------------------------------------------

    @cached_property
    def _memory(self) -> tuple[list[int], list[tuple[str, int, int, int]], list[tuple[int, int]], int]:
        """What the peak of any shard group follows from.

        Live bytes of every record; (unit or "" for flat, width, first, last) of the buffers that the shard group sizes;
        record ranges in which the blocks left out hold kept bytes; kept bytes of one block.
        """
        program = self.program
        lives = lifetimes(program)
        live = [a + b for a, b in zip(lives.live_bytes, lives.workspace_bytes, strict=True)]
        by_elements = {unit.elements: unit.name for unit in self.units.units}
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i in range(len(program.ops)):
            first.update(dict.fromkeys(lives.allocate[i], i))
            last.update(dict.fromkeys(lives.free[i], i))
        end = len(program.ops) - 1
        sized: list[tuple[str, int, int, int]] = []
        for name, buffer in program.buffers.items():
            class_ = class_of(program, name, set()) if buffer.base is None else ""
            if class_ in FLAT:
                unit = ""
            elif class_ in UNIT:
                unit = by_elements[program.local_elements(name)]
            else:
                continue
            if buffer.kind != "temporary" or name in first:
                sized.append((unit, DTYPE_BYTES[buffer.dtype], first.get(name, 0), last.get(name, end)))
        ranges: list[tuple[int, int]] = []
        kept = 0
        for (micro_batch, direction), starts in self.marks.items():
            if direction == "forward" and self.more:
                kept = lives.live_bytes[starts[2]] - lives.live_bytes[starts[1]]
                ranges.append((starts[1], self.marks[micro_batch, "backward"][-1]))
        return live, sized, ranges, kept

    @property
    def kept_bytes(self) -> int:
        """What one more block keeps from forward to backward."""
        return self._memory[3]

    def peak_bytes(self, plan: Plan) -> int:
        """Most bytes that the deep step's own buffers hold at once on one rank, workspace included."""
        if plan.dp_shard not in self._peaks:
            self._peaks[plan.dp_shard] = self._peak_bytes(plan)
        return self._peaks[plan.dp_shard]

    def _peak_bytes(self, plan: Plan) -> int:
        units = self.shallow.units_of(plan)
        deep = self.shallow.flat_elements(plan) - self.units.flat_elements
        kept = self.more * self.kept_bytes
        peak = 0
        for (held, deeper), live in self._highest.items():
            grown = kept if deeper else 0
            for unit, width in held:
                grown += width * (units.by_name[unit].elements - self.units.by_name[unit].elements if unit else deep)
            peak = max(peak, live + grown)
        return peak

    @cached_property
    def _highest(self) -> dict[tuple[tuple[tuple[str, int], ...], bool], int]:
        """The most live bytes among records that grow alike: with what is sized by the shard group, and by depth."""
        live, sized, ranges, _ = self._memory
        starts: dict[int, list[tuple[str, int]]] = {}
        stops: dict[int, list[tuple[str, int]]] = {}
        for unit, width, first, last in sized:
            starts.setdefault(first, []).append((unit, width))
            stops.setdefault(last, []).append((unit, width))
        held: list[tuple[str, int]] = []
        highest: dict[tuple[tuple[tuple[str, int], ...], bool], int] = {}
        for i, bytes_ in enumerate(live):
            held += starts.get(i, ())
            key = (tuple(sorted(held)), any(begin <= i < end for begin, end in ranges))
            highest[key] = max(highest.get(key, 0), bytes_)
            for gone in stops.get(i, ()):
                held.remove(gone)
        return highest
