"""Price a deep step from a shallow one: a few equal blocks are played until steady, the rest follow (torch-free).

The shallow program is built by the same builders as the deep one, with a few blocks instead of all. Every block adds
the same time to forward and to backward once the lanes are steady, and the same kept bytes. The size of the shard group
and the placement of axes on the network change prices, not records, so one shallow program serves all of them.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

from ...kernels.counts import DTYPE_BYTES
from ...kernels.ops import LEAVE_SMS, OPS
from ...parallel.ir.communicators import communicator
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Phase
from ...parallel.passes.pipeline import prepare
from ..clusters.cluster import Cluster
from ..prices.compute import Compute
from ..prices.footprint import FLAT, class_of
from ..prices.network import Cost, Group, Groups, Network, group_of
from ..prices.timeline import (
    COMPUTE,
    FUSE,
    ISSUE,
    WAIT,
    Record,
    Tape,
    Timeline,
    compute_record,
    cost_of,
    fused_record,
    late_on,
    play,
    price,
)
from .few_blocks import Collective, Shallow, canonical
from .peak import Peak

STEADY_BLOCKS = 6  # from here on two blocks in the middle must agree
STEADY = 1e-6  # relative difference of two blocks' times that counts as none


class NotSteady(Exception):
    """Blocks of the shallow step differ in time: only the whole step can say."""


@dataclass(frozen=True)
class Priced:
    """A step priced from its skeleton: seconds of the whole, and of its compute alone."""

    step_s: float
    compute_s: float


@dataclass(frozen=True)
class _Lane:
    """Least seconds of the collectives over one group of axes.

    ``exposed_s``: of those that nothing hides; they add up over the lanes. ``taken``: of each communicator, what its
    others take from compute, and the largest share of it that one takes. ``waited_s``: for what outlasts its compute;
    it may be waited for in another lane at the same time. ``busy_s``: of the busiest communicator.
    """

    exposed_s: float
    taken: list[tuple[float, float]]
    waited_s: float
    busy_s: float


class Skeleton:
    """A shallow program after its passes, with what is needed to price deep steps under any shard group and order."""

    def __init__(self, shallow: Shallow, plan: Plan, compute: Compute, cluster: Cluster) -> None:
        self.shallow = shallow
        self.plan = canonical(plan)
        self.blocks, self.more, self.units = shallow.blocks, shallow.more, shallow.units
        built = shallow.program
        self.program = prepare(replace(built, plan=self.plan), backend="nccl")
        self.compute = compute
        self.cluster = cluster
        self._flat: list[int] = []  # records over the whole flat shard: their time follows its size
        self._collectives: dict[Collective, list[int]] = {}  # records of each: many are alike
        self._lanes: dict[object, _Lane] = {}

    def under(self, plan: Plan) -> Skeleton:
        """The same records under other thread blocks, priorities and margin: nothing is built or scheduled again."""
        other = copy.copy(self)
        other.plan, other._lanes = canonical(plan), {}
        built = self.program
        other.program = replace(built, plan=other.plan)
        other.base = self._repriced(other.program)
        if self.compute.left_sms(other.plan) != self.compute.left_sms(self.plan):
            for name in ("_compute_s", "_flat_s", "_block_compute_s", "terms"):  # follow from the base
                other.__dict__.pop(name, None)
        return other

    def _repriced(self, program: Program) -> Tape:
        """The base tape under another plan's margin and priorities."""
        changed: dict[int, Record] = {}
        margin = self.compute.left_sms(program.plan) != self.compute.left_sms(self.plan)
        for i, (op, record) in enumerate(zip(program.ops, self.base.records, strict=True)):
            if record.kind == ISSUE:
                late = late_on(self.cluster, program.plan, op.axes)
                if late != record.late:
                    changed[i] = replace(record, late=late)
            elif margin and record.kind == COMPUTE and op.kind in LEAVE_SMS:
                changed[i] = compute_record(program, op, self.compute)
            elif margin and record.kind == FUSE:
                changed[i] = fused_record(program, op, self.compute, record.key, record.cost)
        return self.base.with_records(changed) if changed else self.base

    # -- prices ---------------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> Tape:
        """The tape without its network: every collective free."""
        program, units = self.program, self.units
        tape = price(program, self.compute, None, self.cluster)
        by_elements = {unit.elements: unit.name for unit in units.units}
        by_shard = {unit.shard_elements: unit.name for unit in units.units}
        flat = units.flat_elements
        for i, op in enumerate(program.ops):
            if op.is_wait:
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
                unit = by_shard.get(payload // width, "")
            larger = max(op.inputs[0], op.outputs[0], key=program.bytes)
            dims = program.buffers[larger].placement.dims
            other = "cp" if op.axes == ("tp",) else "tp"
            split = any(other in axes for axes in dims)
            collective = Collective(op.kind, op.axes, communicator(op), payload, unit, width, split)
            self._collectives.setdefault(collective, []).append(i)
        return tape

    def tape(self, plan: Plan, network: Network, cluster: Cluster) -> Tape:
        """Prices of the deep model's step under ``plan``, on the shallow program's records."""
        units, flat = self.shallow.units_of(plan), self.shallow.flat_elements(plan)
        base = self.base
        groups = {axes: group_of(cluster, plan, axes) for axes in {c.axes for c in self._collectives}}
        changed: dict[int, Record] = {}
        ratio = flat / self.units.flat_elements
        for i in self._flat:
            changed[i] = replace(base.records[i], seconds=base.records[i].seconds * ratio)
        ctas = {axes: self.plan.ctas(axes) for axes in groups}
        for collective, alike in self._collectives.items():
            axes, was = collective.axes, base.records[alike[0]]
            cost = cost_of(network, collective.kind, collective.payload(units, flat), groups[axes], ctas[axes])
            if was.kind == ISSUE:
                changed.update(dict.fromkeys(alike, replace(was, cost=cost)))
            else:  # a fused record has compute of its own
                changed.update((i, replace(base.records[i], cost=cost)) for i in alike)
        return base.with_records(changed)

    # -- time -----------------------------------------------------------------------------------------------------

    @cached_property
    def marks(self) -> dict[tuple[int | None, Phase], list[int]]:
        """First record of every block, by micro-batch and direction, in the order of execution."""
        marks: dict[tuple[int | None, Phase], dict[int, int]] = {}
        for i, op in enumerate(self.program.ops):
            if op.clone or op.kind not in OPS:
                continue
            place = op.place
            if place.block is not None and place.phase in (Phase.FORWARD, Phase.BACKWARD):
                marks.setdefault((place.micro_batch, place.phase), {}).setdefault(place.block, i)
        return {key: list(blocks.values()) for key, blocks in marks.items()}

    def step_s(self, timeline: Timeline, steady: float = STEADY) -> float:
        """The deep step's time from the shallow one's. Raises NotSteady where blocks do not agree."""
        total = timeline.step_s
        if self.more == 0:
            return total
        for (_, direction), starts in self.marks.items():
            begun = [timeline.start[i] for i in starts]
            each = [after - before for before, after in itertools.pairwise(begun)]
            at = self._middle(direction)
            if self.blocks >= STEADY_BLOCKS and abs(each[at] - each[at + 1]) > steady * each[at]:
                raise NotSteady(f"two blocks take {each[at]:.6g} s and {each[at + 1]:.6g} s")
            total += self.more * each[at]
        return total

    def _middle(self, direction: Phase) -> int:
        """The block whose time and records the blocks left out repeat.

        Lanes fill in the first blocks of either direction; they run dry in the last backward ones.
        """
        return self.blocks - 3 if direction is Phase.FORWARD else min(2, (self.blocks - 1) // 2)

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
                added += record.seconds if record.computes else 0.0
        return added

    @cached_property
    def terms(self) -> dict[Axes, dict[tuple[int, float], int]]:
        """How often each collective over some axes stands in the deep step, by the compute seconds that can hide it.

        A collective is told by its place among those that differ. None between issue and wait: -1. More than any
        collective takes where another one of its communicator is in flight in the same window, so that no time is
        counted twice.
        """
        records = self.base.records
        waits = {record.key: i for i, record in enumerate(records) if record.kind == WAIT}
        passed = list(itertools.accumulate((r.seconds for r in records), initial=0.0))
        counts: dict[Axes, dict[tuple[int, float], int]] = {}
        last: dict[str, int] = {}
        distinct = list(self._collectives)
        for i, place in sorted((i, k) for k, alike in enumerate(self._collectives.values()) for i in alike):
            collective = distinct[place]
            fused = records[i].kind == FUSE
            wait = i if fused else waits[i]
            window = records[i].seconds - records[i].alone_s if fused else passed[wait] - passed[i]
            if wait == i + 1:
                window = -1.0
            elif last.get(collective.communicator, -1) > i:
                window = math.inf
            else:
                last[collective.communicator] = wait
            key, of_axes = (place, window), counts.setdefault(collective.axes, {})
            of_axes[key] = of_axes.get(key, 0) + self.repeats(i)
        return counts

    def bound_s(self, plan: Plan, network: Network, groups: Groups) -> float:
        """A lower bound of the deep step, without playing it.

        Compute runs one record after the other. A collective in flight takes SMs or memory bandwidth from it, unless
        compute stands still for another one; what runs longer than the compute between its issue and its wait is
        waited for.
        """
        ratio = self.shallow.flat_elements(plan) / self.units.flat_elements
        total = self._compute_s + self._flat_s * ratio
        longest = waited = exposed = 0.0
        beside: list[tuple[float, float]] = []
        for axes, group in groups.items():
            key = (axes, group, plan.dp_shard if "dp_shard" in axes or axes == ("dp_replicate",) else 0)
            found = self._lanes.get(key)
            if found is None:
                found = self._lanes[key] = self._lane(plan, network, axes, group)
            exposed += found.exposed_s
            beside += found.taken
            waited = max(waited, found.waited_s)
            longest = max(longest, found.busy_s)
        total += exposed + sum(max(0.0, taken - share * exposed) for taken, share in beside)
        return max(total + waited, longest)

    def taken(self, cost: Cost) -> float:
        """The share of compute that a collective in flight takes at least, whatever runs beside it."""
        tape = self.base
        margin = self.compute.left_sms(self.plan)
        sms = max(0.0, cost.sms - margin) / (tape.sms - margin)
        share = min(sms, cost.memory_bytes_per_s / tape.memory_bytes_per_s)
        return min(share * tape.compute_slowdown, 1.0)

    def _lane(self, plan: Plan, network: Network, axes: Axes, group: Group) -> _Lane:
        units, flat = self.shallow.units_of(plan), self.shallow.flat_elements(plan)
        exposed = 0.0
        taken: dict[str, tuple[float, float]] = {}
        busy: dict[str, float] = {}
        waited: dict[str, float] = {}
        ctas = self.plan.ctas(axes)
        priced: dict[int, tuple[str, float, float]] = {}
        for place, collective in enumerate(self._collectives):
            if collective.axes == axes:
                cost = cost_of(network, collective.kind, collective.payload(units, flat), group, ctas)
                priced[place] = collective.communicator, cost.seconds, self.taken(cost)
        for (place, window), times in self.terms.get(axes, {}).items():
            name, seconds, share = priced[place]
            busy[name] = busy.get(name, 0.0) + times * seconds
            if window < 0.0:
                exposed += times * seconds
                continue
            before, largest = taken.get(name, (0.0, 0.0))
            taken[name] = before + times * seconds * share, max(largest, share)
            waited[name] = waited.get(name, 0.0) + times * max(0.0, seconds * (1.0 - share) - window)
        return _Lane(exposed, list(taken.values()), max(waited.values(), default=0.0), max(busy.values(), default=0.0))

    def price(self, plan: Plan, network: Network, cluster: Cluster) -> Priced:
        """From the shallow step where that is steady, else from the whole one."""
        try:
            return self.steady_price(plan, network, cluster)
        except NotSteady:
            shallow = self.shallow
            deep = Shallow(shallow.config, plan, shallow.batch, blocks=shallow.config.layers)
            return Skeleton(deep, plan, self.compute, cluster).price(plan, network, cluster)

    def steady_price(self, plan: Plan, network: Network, cluster: Cluster, steady: float = STEADY) -> Priced:
        """Raises NotSteady where blocks do not agree within ``steady``."""
        tape = self.tape(plan, network, cluster)
        step_s = self.step_s(play(tape), steady)
        return Priced(step_s, tape.compute_s + self.more * self._block_compute_s)

    # -- memory ---------------------------------------------------------------------------------------------------

    @cached_property
    def _peak(self) -> Peak:
        return Peak(self.program, self.shallow, self.marks)

    @property
    def kept_bytes(self) -> int:
        """What one more block keeps from forward to backward."""
        return self._peak.kept_bytes

    def peak_bytes(self, plan: Plan) -> int:
        """Most bytes that the deep step's own buffers hold at once on one rank, workspace included."""
        return self._peak.bytes(plan)
