"""Price a deep step from a few of its blocks: one stands for all that are left out (torch-free).

The program of a few blocks is built by the same builders as the whole one. Its records are played as often as they
stand in the whole step, or until nothing changes any more from one block to the next (``unroll.py``). The size of the
shard group, the placement of axes on the network and how the GPU is shared change prices, not records, so one program
serves all of them; only the schedule pass orders by prices of its own, which see the program's own shard group.
"""

from __future__ import annotations

import itertools
import math
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

from ...kernels.counts import DTYPE_BYTES
from ...kernels.ops import OPS
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.communicators import communicator
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ...parallel.ir.records import Op, Space
from ...parallel.ir.units import Units
from ..prices.footprint import FLAT, class_of
from ..prices.models import PriceModels
from ..prices.network import Cost, Group, Groups, group_of
from ..prices.timeline import FUSE, ISSUE, WAIT, Record, Tape, cost_of, late_on, price
from .few_blocks import FewBlocks, blocks_of
from .peak import Peak
from .unroll import Stretches, Unrolled, marks_of, play_unrolled


@dataclass(frozen=True)
class StepPrice:
    """Seconds of a whole step without stragglers and encoders, of its compute alone, and of its waiting."""

    step_s: float
    compute_s: float
    exposed_s: float


@dataclass(frozen=True)
class Alike:
    """A collective that stands in the step as often as it has records.

    ``unit``: the unit whose size it has, or whose shard's size if it sums over replicas; "" the whole flat shard; None
    neither. ``to``: of a copy to or from the host, where it goes.
    """

    kind: str
    axes: Axes
    communicator: str
    bytes: int
    unit: str | None
    width: int
    to: Space | None = None

    def payload(self, units: Units, flat_elements: int) -> int:
        """Bytes under another shard group."""
        if self.unit is None:
            return self.bytes
        if not self.unit:
            return flat_elements * self.width
        unit = units.by_name[self.unit]
        return (unit.shard_elements if self.axes == ("dp_replicate",) else unit.elements) * self.width


@dataclass(frozen=True)
class _Windows:
    """Compute seconds of a step in which every collective is free, and what of it can hide which collective.

    ``flat_s``: over the few blocks' flat shard. ``compute_s``: of the whole step, without it. ``counts``: of the
    collectives over some axes, how often each stands in the whole step, by its place among those that differ and the
    compute seconds between its issue and its wait: -1 where there is nothing between, and more than any collective
    takes where another one of its communicator is in flight in the same window, so that no time is counted twice.
    """

    flat_s: float
    compute_s: float
    counts: dict[Axes, dict[tuple[int, float], int]]


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


def standing_s(still: float, taken: list[tuple[float, float]]) -> float:
    """Least seconds that compute loses where it stands still for ``still`` at least, whatever the lanes do meanwhile.

    What nothing hides is waited for one after the other, what outlasts its compute in any one lane: both may be
    the same seconds. ``taken``: what a lane takes from compute, and the largest share of it; nothing meanwhile.
    """
    longer = (seconds / share for seconds, share in taken if share * still < seconds)
    return min(at + sum(max(0.0, seconds - share * at) for seconds, share in taken) for at in (still, *longer))


def taken_of(models: PriceModels, plan: Plan, cost: Cost) -> float:
    """The share of compute that a collective in flight takes at least, whatever runs beside it."""
    cluster, margin = models.cluster, models.compute.left_sms(plan)
    sms = max(0.0, cost.sms - margin) / (cluster.gpu.sms - margin)
    share = min(sms, cost.memory_bytes_per_s / cluster.gpu.memory_bytes_per_s)
    return min(share * cluster.overlap.compute_slowdown, 1.0)


class Extrapolation:
    """A few blocks' program after its passes, and whole steps priced from it.

    It serves every plan of the same records: another shard group, placement, thread blocks, margin and priorities.
    """

    def __init__(self, few: FewBlocks, plan: Plan, models: PriceModels) -> None:
        self.few, self.models = few, models
        self.plan = few.under(plan)
        self.program = few.prepared(plan, models.cluster.backend)
        self.built = blocks_of(self.plan, few.blocks)
        self._unrolled: dict[tuple[tuple[int, int], int], Unrolled] = {}
        self._tapes: dict[int, Tape] = {}  # by the SMs that compute leaves alone
        self._windows: dict[object, _Windows] = {}  # by ``_depth``
        self._lanes: dict[object, _Lane] = {}

    def on(self, models: PriceModels) -> Extrapolation:
        """The same records on another cluster."""
        other = copy(self)
        other.models, other._tapes, other._windows, other._lanes = models, {}, {}, {}
        return other

    # -- what the records are -------------------------------------------------------------------------------------

    @cached_property
    def stretches(self) -> Stretches:
        """What repeats: prices ask for it, peaks do not."""
        return Stretches(self.program, proven=self.few.own)

    @cached_property
    def _flat(self) -> list[int]:
        """Compute records over the whole flat shard: their time follows its size."""
        program, flat = self.program, self.few.units.flat_elements

        def spans(op: Op) -> bool:
            whole = (name for name in (*op.inputs, *op.outputs) if program.local_elements(name) == flat)
            return any(class_of(program, program.root(name)[0], set()) in FLAT for name in whole)

        return [i for i, op in enumerate(program.ops) if op.kind in OPS and spans(op)]

    @cached_property
    def _computing(self) -> list[int]:
        """Records that compute, fused ones too."""
        return [i for i, op in enumerate(self.program.ops) if op.kind in OPS or op.kind in FUSED]

    @cached_property
    def _collectives(self) -> dict[Alike, list[int]]:
        """Records of every collective that differs from the others."""
        program, units = self.program, self.few.units
        by_elements = {unit.elements: unit.name for unit in units.all}
        by_shard = {unit.shard_elements: unit.name for unit in units.units}
        found: dict[Alike, list[int]] = {}
        for i, op in enumerate(program.ops):
            if op.is_wait or op.kind in OPS:
                continue
            payload, unit = program.payload_bytes(op), None
            width = DTYPE_BYTES[program.buffers[op.outputs[0]].dtype]
            if "dp_shard" in op.axes:
                unit = by_elements.get(payload // width)
            elif op.axes == ("dp_replicate",):
                unit = by_shard.get(payload // width, "")
            alike = Alike(op.kind, op.axes, communicator(op), payload, unit, width, op.to)
            found.setdefault(alike, []).append(i)
        return found

    def unrolled(self, plan: Plan) -> Unrolled:
        """The whole step of a plan. Raises NotSteady where only the whole program can say what repeats."""
        key = blocks_of(plan, self.few.config.layers), plan.micro_batches
        if key not in self._unrolled:
            self._unrolled[key] = self.stretches.unroll(*key)
        return self._unrolled[key]

    # -- time, played ---------------------------------------------------------------------------------------------

    def _free(self, plan: Plan) -> Tape:
        """The tape with every collective free, under a plan's margin."""
        left = self.models.compute.left_sms(plan)
        if left not in self._tapes:
            program = self.program
            if left != self.models.compute.left_sms(self.plan):
                program = program.under(replace(self.plan, sm_margin=left))
            self._tapes[left] = price(program, self.models.compute, None, self.models.cluster)
        return self._tapes[left]

    def tape(self, plan: Plan) -> Tape:
        """Prices of the whole model's step under ``plan``, on the few blocks' records."""
        cluster, free = self.models.cluster, self._free(plan)
        units, flat = self.few.units_of(plan), self.few.flat_elements(plan)
        ratio = flat / self.few.units.flat_elements
        changed = {i: replace(free.records[i], seconds=free.records[i].seconds * ratio) for i in self._flat}
        groups = {axes: group_of(cluster, plan, axes) for axes in {alike.axes for alike in self._collectives}}
        for alike, at in self._collectives.items():
            axes, was = alike.axes, free.records[at[0]]
            payload, ctas = alike.payload(units, flat), plan.ctas(axes)
            cost = cost_of(self.models.network, alike.kind, payload, groups[axes], ctas, alike.to)
            if was.kind == ISSUE:
                changed.update(dict.fromkeys(at, replace(was, cost=cost, late=late_on(cluster, plan, axes))))
            else:  # a fused record has compute of its own
                changed.update((i, replace(free.records[i], cost=cost)) for i in at)
        return free.with_records(changed)

    def price(self, plan: Plan) -> StepPrice:
        """The whole step's. Raises NotSteady as ``unrolled`` does.

        Where a recompute mode has fewer blocks than are built, along the line through this many and one more.
        """
        tape, unrolled = self.tape(plan), self.unrolled(plan)
        counts, records = unrolled.counts, tape.records
        compute_s = sum([counts[i] * records[i].seconds for i in self._computing])
        deep = blocks_of(plan, self.few.config.layers)
        short = [few - n for few, n in zip(self.built, deep, strict=True)]
        if max(short) <= 0:
            step_s, exposed_s = play_unrolled(tape, self.stretches, unrolled)
            return StepPrice(step_s, compute_s, exposed_s)
        least = max(self.built[1], 1) if short[1] > 0 else plan.last_blocks - short[0]
        more = 1 if short[1] > 0 else -1
        at, beyond = (
            play_unrolled(tape, self.stretches, self.unrolled(replace(plan, last_blocks=n)))
            for n in (least, least + more)
        )
        step_s, exposed_s = (one + max(short) * (one - other) for one, other in zip(at, beyond, strict=True))
        return StepPrice(step_s, compute_s, max(exposed_s, 0.0))

    def hardware_flops(self, plan: Plan) -> int:
        """Of the matrix products that one rank runs in the whole step."""
        return self.unrolled(plan).hardware_flops(self.program)

    # -- time, bounded --------------------------------------------------------------------------------------------

    def bound_s(self, plan: Plan, groups: Groups) -> float:
        """A lower bound of the whole step, without playing it; ``groups``: how the plan's axes lie on the network.

        Compute runs one record after the other. A collective in flight takes SMs or memory bandwidth from it, unless
        compute stands still for another one; what runs longer than the compute between its issue and its wait is
        waited for.
        """
        hidden_by, under = self._hidden_by(plan), self._depth(plan)
        ratio = self.few.flat_elements(plan) / self.few.units.flat_elements
        lanes = [self._lane_of(plan, axes, group, under) for axes, group in groups.items()]
        still = max([sum(lane.exposed_s for lane in lanes), *(lane.waited_s for lane in lanes)])
        longer = standing_s(still, [taken for lane in lanes for taken in lane.taken])
        least = hidden_by.compute_s + hidden_by.flat_s * ratio + longer
        return max([least, *(lane.busy_s for lane in lanes)])

    def _lane_of(self, plan: Plan, axes: Axes, group: Group, under: object) -> _Lane:
        """As ``_lane``, made once."""
        sized = plan.dp_shard if "dp_shard" in axes or axes == ("dp_replicate",) else 0
        key = (axes, group, sized, plan.ctas(axes), under)
        if key not in self._lanes:
            self._lanes[key] = self._lane(plan, axes, group)
        return self._lanes[key]

    def _lane(self, plan: Plan, axes: Axes, group: Group) -> _Lane:
        units, flat = self.few.units_of(plan), self.few.flat_elements(plan)
        exposed = 0.0
        taken: dict[str, tuple[float, float]] = {}
        busy: dict[str, float] = {}
        waited: dict[str, float] = {}
        ctas = plan.ctas(axes)
        priced: dict[int, tuple[str, float, float]] = {}
        for place, alike in enumerate(self._collectives):
            if alike.axes == axes:
                cost = cost_of(self.models.network, alike.kind, alike.payload(units, flat), group, ctas)
                priced[place] = alike.communicator, cost.seconds, taken_of(self.models, plan, cost)
        for (place, window), times in self._hidden_by(plan).counts.get(axes, {}).items():
            name, seconds, share = priced[place]
            busy[name] = busy.get(name, 0.0) + times * seconds
            if window < 0.0:
                exposed += times * seconds
                continue
            before, largest = taken.get(name, (0.0, 0.0))
            taken[name] = before + times * seconds * share, max(largest, share)
            waited[name] = waited.get(name, 0.0) + times * max(0.0, seconds * (1.0 - share) - window)
        return _Lane(exposed, list(taken.values()), max(waited.values(), default=0.0), max(busy.values(), default=0.0))

    def _depth(self, plan: Plan) -> tuple[int, tuple[int, int], int]:
        """What compute records cost, and how often each is met, follow from."""
        return self.models.compute.left_sms(plan), blocks_of(plan, self.few.config.layers), plan.micro_batches

    def _hidden_by(self, plan: Plan) -> _Windows:
        key = self._depth(plan)
        if key not in self._windows:
            records, counts = self._free(plan).records, self.unrolled(plan).counts
            flat_s = sum(records[i].seconds for i in self._flat)
            compute_s = sum([counts[i] * records[i].seconds for i in self._computing]) - flat_s
            self._windows[key] = _Windows(flat_s, compute_s, self._counts(records, counts))
        return self._windows[key]

    def _counts(self, records: list[Record], repeats: list[int]) -> dict[Axes, dict[tuple[int, float], int]]:
        waits = {record.key: i for i, record in enumerate(records) if record.kind == WAIT}
        passed = list(itertools.accumulate((r.seconds for r in records), initial=0.0))
        counts: dict[Axes, dict[tuple[int, float], int]] = {}
        last: dict[str, int] = {}
        distinct = list(self._collectives)
        for i, place in sorted((i, k) for k, at in enumerate(self._collectives.values()) for i in at):
            alike = distinct[place]
            fused = records[i].kind == FUSE
            wait = i if fused else waits[i]
            window = records[i].seconds - records[i].alone_s if fused else passed[wait] - passed[i]
            if wait == i + 1:
                window = -1.0
            elif last.get(alike.communicator, -1) > i:
                window = math.inf
            else:
                last[alike.communicator] = wait
            key, of_axes = (place, window), counts.setdefault(alike.axes, {})
            of_axes[key] = of_axes.get(key, 0) + repeats[i]
        return counts

    # -- memory ---------------------------------------------------------------------------------------------------

    @cached_property
    def _peak(self) -> Peak:
        return Peak(self.program, self.few, marks_of(self.program), self.models.workspaces)

    @cached_property
    def _host_peak(self) -> Peak:
        return Peak(self.program, self.few, marks_of(self.program), self.models.workspaces, Space.HOST)

    def host_bytes(self, plan: Plan) -> int:
        """Most bytes that the whole step holds at once in host memory for one rank."""
        return self._host_peak.bytes(plan) if plan.offload else 0

    @property
    def kept_bytes(self) -> int:
        """What one more of the first blocks keeps from forward to backward."""
        return self._peak.kept_bytes[0]

    def peak_bytes(self, plan: Plan) -> int:
        """Most bytes that the whole step's own buffers hold at once on one rank, and the most workspace of a record."""
        return self._peak.bytes(plan)
