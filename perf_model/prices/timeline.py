"""The timeline: lanes played side by side, under the start rule that the runtime keeps (torch-free).

[Note: start rule] A collective starts after all compute before its issue point, after the previous collective of its
communicator, and after the start of every collective issued earlier. Compute runs in the program's order; a wait holds
it until its collective has ended. That hold is exposed time. A collective whose stream has no priority (``late``) and
whose turn comes while a record computes starts when that record ends: the record's blocks stand before its own. Where
the record leaves as many SMs as all collectives in flight hold, this one with them, it starts at once.

[Note: contention] Between two events every rate is constant. A collective first pays its latency, then moves its
bytes; those that move over the same link at the same time share it. While collectives are in flight, compute loses the
SMs that their channels hold (matmul, attention) or the memory bandwidth that they use (everything else). A record that
leaves SMs (``plan.sm_margin``) runs on the others at all times, and loses only what is held beyond those that it left.

[Note: fused records] A gather and its products, or a product and its reduce-scatter, as one record
(``fuse_tp.py``) run on the compute lane and hold the communicator: they start when both are free and all that
was issued earlier has started. After the collective's latency all products but those of one rank's rows run beside its
transfer; when both are done, those: latency + max(C (R - 1) / R, W) + C / R, which is the formula given there. What a
rank copies or sums in its own memory comes on top. Ranks copy without SMs. On gloo nothing runs beside.

[Note: one at a time] Where NCCL runs collectives of different communicators one after another (``nccl_stack.py``), all
wait in one queue; fused records are none of NCCL's. [Note: host] A copy to or from the host is in no order with the
collectives: only those of its own way stand before it.

A ``Tape`` is a program with its prices, flat and small: playing the 48-layer step takes tens of milliseconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import cached_property

from ...errors import CinemeshError
from ...kernels.ops import OPS
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.communicators import communicator
from ...parallel.ir.layout import HEADS, Axes
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op, Space
from ..clusters.cluster import Cluster
from .compute import Compute
from .host import copy_cost
from .network import FREE, Cost, Group, Network, group_of

COMPUTE, ISSUE, WAIT, FUSE = 0, 1, 2, 3
_FOREVER = float("inf")


@dataclass(slots=True)
class Record:
    """One record of the program with its price; made once, and never changed.

    ``key``: of a wait, the index of its issue; of an issue, its communicator, or its way of the host's link. ``busy``:
    compute that needs SMs (True) or memory bandwidth (False). ``leaves``: SMs that compute leaves alone. ``late``: of
    an issue, without priority. ``copies``: of an issue, see [Note: host]. ``alone_s``: of a fused record's ``seconds``,
    those behind its transfer.
    """

    kind: int
    seconds: float = 0.0
    busy: bool = True
    key: int = -1
    cost: Cost = FREE
    leaves: int = 0
    late: bool = False
    alone_s: float = 0.0
    copies: bool = False

    @property
    def computes(self) -> bool:
        return self.kind in (COMPUTE, FUSE)


@dataclass(frozen=True)
class Tape:
    """Records in the program's order, and what contention needs to know of the cluster."""

    records: list[Record]
    sms: int
    memory_bytes_per_s: float
    compute_slowdown: float
    communication_slowdown: float

    @cached_property
    def compute_s(self) -> float:
        return sum(record.seconds for record in self.records if record.computes)

    def with_records(self, changed: dict[int, Record]) -> Tape:
        records = list(self.records)
        for i, record in changed.items():
            records[i] = record
        return replace(self, records=records)


@dataclass
class Timeline:
    """When every record ran. Times in seconds from the start of the step; ``start``, ``end`` by record index.

    Of an issue, ``start`` and ``end`` are those of its collective; ``exposed_s`` maps an issue's index to the time that
    compute waited for it.
    """

    step_s: float
    start: list[float]
    end: list[float]
    exposed_s: dict[int, float] = field(default_factory=dict)
    compute_busy_s: float = 0.0

    @property
    def total_exposed_s(self) -> float:
        return sum(self.exposed_s.values())


def price(program: Program, compute: Compute, network: Network | None, cluster: Cluster) -> Tape:
    """Price every record of a program on a cluster. Without a network, every collective is free.

    Raises CinemeshError when the plan shares the GPU as it cannot be shared, or fuses beyond an NVLink domain.
    """
    if network is not None:
        check_fused(program.plan, cluster)
    compute.check(program.plan)
    records: list[Record] = []
    issue_at: dict[str, int] = {}
    communicators: dict[str, int] = {}
    groups = {}
    for i, op in enumerate(program.ops):
        if op.is_wait:
            records.append(Record(WAIT, key=issue_at[op.waits_for]))
        elif op.kind in OPS:
            records.append(compute_record(program, op, compute))
        else:
            issue_at[op.name] = i
            serial = cluster.one_at_a_time and op.to is None and op.kind not in FUSED
            name = "" if serial else communicator(op)  # one queue for all
            cost = FREE
            if network is not None:
                if op.axes not in groups:
                    groups[op.axes] = group_of(cluster, program.plan, op.axes)
                ctas = program.plan.ctas(op.axes)
                cost = cost_of(network, op.kind, program.payload_bytes(op), groups[op.axes], ctas, op.to)
            key, late = communicators.setdefault(name, len(communicators)), late_on(cluster, program.plan, op.axes)
            if op.kind in FUSED:
                records.append(fused_record(program, op, compute, key, cost))
            else:
                records.append(Record(ISSUE, key=key, cost=cost, late=late, copies=op.to is not None))
    return Tape(
        records,
        cluster.gpu.sms,
        cluster.gpu.memory_bytes_per_s,
        cluster.overlap.compute_slowdown,
        cluster.overlap.communication_slowdown,
    )


def compute_record(program: Program, op: Op, compute: Compute) -> Record:
    """A compute op with its price."""
    price = compute.price(program, op)
    return Record(COMPUTE, price.seconds, price.bound == "compute", leaves=compute.margin(program, op))


def late_on(cluster: Cluster, plan: Plan, axes: Axes) -> bool:
    """Whether collectives over ``axes`` yield to compute. Without NCCL there are no streams to say so."""
    return cluster.nccl is not None and not plan.high_priority(axes)


def cost_of(network: Network, kind: str, payload_bytes: int, group: Group, ctas: int, to: Space | None = None) -> Cost:
    """Of a collective, or of that within a fused record; of a copy to a space."""
    if to is not None:
        return copy_cost(network.cluster, to, payload_bytes)
    cost = network.collective(FUSED.get(kind, kind), payload_bytes, group, ctas if kind not in FUSED else 0)
    if kind not in FUSED:
        return cost
    if network.cluster.gloo is not None:
        return replace(cost, latency_s=cost.seconds, transfer_s=0.0)
    return replace(cost, sms=0, algorithm="copies")


def fused_record(program: Program, op: Op, compute: Compute, key: int, cost: Cost) -> Record:
    """A fused record with its price; products of one rank's rows are taken to run as fast as the whole."""
    products = [compute_record(program, part, compute) for part in op.parts if part.kind in OPS]
    seconds = sum(record.seconds for record in products)
    if op.kind == "gather_matmul":  # this rank's rows go to symmetric memory first
        own = 2 * program.bytes(op.inputs[0])
    else:  # what was received is summed
        own = program.payload_bytes(op) + program.bytes(op.outputs[0])
    copied = compute.stream_s(own) if compute.cluster.gloo is None else 0.0
    alone = seconds / program.plan.size(op.axes) + copied
    return Record(FUSE, seconds + copied, key=key, cost=cost, leaves=products[0].leaves, alone_s=alone)


def beyond_domain(plan: Plan, cluster: Cluster, group: Group) -> bool:
    """Whether ``fused_tp`` would have to reach beyond one NVLink domain; ``group``: that of tp."""
    return plan.fused_tp and cluster.gloo is None and group.domains > 1


def check_fused(plan: Plan, cluster: Cluster) -> None:
    """Raise CinemeshError where ``fused_tp`` would have to reach beyond one NVLink domain."""
    group = group_of(cluster, plan, HEADS)
    if beyond_domain(plan, cluster, group):
        stride = plan.size(plan.order[: plan.order.index("tp")])
        ranks = ", ".join(str(i * stride) for i in range(plan.tp))
        raise CinemeshError(
            f"plan: fused_tp(true): ranks {ranks} of one tp group lie in {group.domains} NVLink domains "
            f"of {cluster.topology.domain_gpus} GPUs, and torch's symmetric memory reaches within one",
            remedy="put tp first in order, lower tp, or set fused_tp to false",
        )


class Flight:
    """One collective in flight; ``index``: what its issue was called. ``sms``, ``memory``: what it takes of the GPU."""

    __slots__ = ("index", "latency", "link", "memory", "rate", "record", "sms", "transfer")

    def __init__(self, index: int, record: Record, tape: Tape) -> None:
        cost = record.cost
        self.index, self.record, self.link = index, record, cost.link
        self.latency, self.transfer = cost.latency_s, cost.transfer_s
        self.rate = 1.0  # progress for each second
        self.sms, self.memory = cost.sms / tape.sms, cost.memory_bytes_per_s / tape.memory_bytes_per_s


class Player:
    """The state between two events. ``start``, ``end``: of collectives, by the index that their issue was given."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.start: dict[int, float] = {}
        self.end: dict[int, float] = {}
        self.now = 0.0
        self.queue: deque[tuple[int, Record]] = deque()
        self.copies: list[tuple[int, Record]] = []  # to and from the host, whose way is not free
        self.flights: list[Flight] = []
        self.occupied: set[int] = set()  # communicators with a collective in flight
        self.computing: Record | None = None
        self.beside = 1.0 / tape.communication_slowdown  # what compute leaves of a transfer's rate

    def issue(self, index: int, record: Record) -> None:
        (self.copies if record.copies else self.queue).append((index, record))
        self.launch()

    def wait(self, index: int) -> None:
        """Raises ValueError when it can never end (a program that no runtime could finish either)."""
        while index not in self.end:
            if not self.flights:
                raise ValueError(f"a record waits for collective {index}, which never starts")
            self.advance(_FOREVER, False)

    def drain(self) -> None:
        """Until nothing is in flight."""
        while self.flights:
            self.advance(_FOREVER, False)

    def compute(self, record: Record, seconds: float) -> None:
        """Run as much of a record as takes ``seconds`` where nothing is in flight."""
        left = seconds
        self.computing = record
        while left > 0.0:
            if not self.flights:
                self.now += left
                break
            rate = self.compute_rate(record)
            passed = self.advance(left / rate, True)
            left -= passed * rate
            if left < 1e-15:
                left = 0.0
        self.computing = None
        if self.queue or self.copies:
            self.launch()

    def fused(self, index: int, record: Record) -> tuple[float, float]:
        """Seconds that a fused record computes, and that it holds compute without. See [Note: fused records]."""
        reached = self.now
        self.issue(index, record)
        while index not in self.start:
            self.advance(_FOREVER, False)
        begun = self.now
        while any(flight.index == index and flight.latency > 0.0 for flight in self.flights):
            self.advance(_FOREVER, False)
        waited, at = self.now - reached, self.now
        self.compute(record, record.seconds - record.alone_s)
        busy, at = self.now - at, self.now
        while index not in self.end:
            self.advance(_FOREVER, False)
        waited, at = waited + self.now - at, self.now
        self.compute(record, record.alone_s)
        self.start[index], self.end[index] = begun, self.now
        return busy + self.now - at, waited

    def launch(self) -> None:
        """Start queued collectives in the order of their issue, as far as their communicators are free; and copies."""
        while self.queue:
            index, record = self.queue[0]
            if record.key in self.occupied or (record.late and self._must_yield(record)):
                break
            self.queue.popleft()
            self._start(index, record)
        if self.copies:
            waiting, self.copies = self.copies, []
            for index, record in waiting:
                if record.key in self.occupied:
                    self.copies.append((index, record))
                else:
                    self._start(index, record)

    def _start(self, index: int, record: Record) -> None:
        self.start[index] = self.now
        if record.cost.seconds <= 0.0:
            self.end[index] = self.now
            return
        self.occupied.add(record.key)
        self.flights.append(Flight(index, record, self.tape))

    def _must_yield(self, record: Record) -> bool:
        """Whether the SMs that a collective needs are taken by blocks of compute that stand before its own."""
        if self.computing is None:
            return False
        return self.computing.leaves < record.cost.sms + sum(flight.record.cost.sms for flight in self.flights)

    def compute_rate(self, record: Record) -> float:
        """Progress of compute for each second, beside what is in flight."""
        tape, busy = self.tape, record.busy
        held = 0.0
        for flight in self.flights:
            held += flight.sms if busy else flight.memory
        if busy and record.leaves:
            held = max(0.0, held * tape.sms - record.leaves) / (tape.sms - record.leaves)
        return max(1.0 - held * tape.compute_slowdown, 0.1)

    def pace(self, computing: bool) -> None:
        """Set the rate of every flight: latency runs alone, bytes on one link are shared."""
        beside = self.beside if computing else 1.0
        moving: dict[str, int] = {}
        for flight in self.flights if len(self.flights) > 1 else ():
            if flight.latency <= 0.0:
                moving[flight.link] = moving.get(flight.link, 0) + 1
        for flight in self.flights:
            flight.rate = 1.0 if flight.latency > 0.0 else beside / moving.get(flight.link, 1)

    def advance(self, limit: float, computing: bool) -> float:
        """Move time to the next event of a flight, or by ``limit``. Returns the time that passed."""
        self.pace(computing)
        step = limit
        for flight in self.flights:
            left = (flight.latency if flight.latency > 0.0 else flight.transfer) / flight.rate
            if left < step:
                step = left
        self.now += step
        finished = False
        for flight in self.flights:
            if flight.latency > 0.0:
                flight.latency -= step
                if flight.latency <= 1e-15:
                    flight.latency = 0.0
                    finished = finished or flight.transfer <= 0.0
            else:
                flight.transfer -= step * flight.rate
                if flight.transfer <= 1e-15:
                    flight.transfer = 0.0
                    finished = True
        if finished:
            self._land()
        return step

    def _land(self) -> None:
        still: list[Flight] = []
        for flight in self.flights:
            if flight.latency > 0.0 or flight.transfer > 0.0:
                still.append(flight)
                continue
            self.end[flight.index] = self.now
            self.occupied.discard(flight.record.key)
        self.flights = still
        self.launch()


def play(tape: Tape) -> Timeline:
    """Run a tape. Raises ValueError when a wait can never end (a program that no runtime could finish either)."""
    player = Player(tape)
    exposed: dict[int, float] = {}
    start, end = [0.0] * len(tape.records), [0.0] * len(tape.records)
    busy_s = 0.0
    for i, record in enumerate(tape.records):
        start[i] = player.now
        if record.kind == COMPUTE:
            player.compute(record, record.seconds)
            busy_s += player.now - start[i]
        elif record.kind == ISSUE:
            player.issue(i, record)
        elif record.kind == FUSE:
            computed, exposed[i] = player.fused(i, record)
            busy_s += computed
        else:
            player.wait(record.key)
            exposed[record.key] = exposed.get(record.key, 0.0) + player.now - start[i]
        end[i] = player.now
    player.drain()
    for i, at in player.start.items():
        start[i], end[i] = at, player.end[i]
    return Timeline(player.now, start, end, exposed, busy_s)
