"""The timeline: lanes played side by side, under the start rule that the runtime keeps (torch-free).

[Note: start rule] A collective starts after all compute before its issue point, after the previous collective of its
communicator, and after the start of every collective issued earlier. Compute runs in the program's order; a wait holds
it until its collective has ended. That hold is exposed time.

[Note: contention] Between two events every rate is constant. A collective first pays its latency, then moves its
bytes; those that move over the same link at the same time share it. While collectives are in flight, compute loses the
SMs that their channels hold (matmul, attention) or the memory bandwidth that they use (everything else).

A ``Tape`` is a program with its prices, flat and small: playing the 48-layer step takes tens of milliseconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from ..parallel.communicators import communicator
from ..parallel.ops import OPS
from ..parallel.program import Program
from .cluster import Cluster
from .compute import Compute
from .network import FREE, Cost, Network, group_of

COMPUTE, ISSUE, WAIT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the program with its price.

    ``key``: of a wait, the index of its issue; of an issue, its communicator. ``busy``: compute that needs SMs (True)
    or memory bandwidth (False).
    """

    kind: int
    seconds: float = 0.0
    busy: bool = True
    key: int = -1
    cost: Cost = FREE


@dataclass(frozen=True)
class Tape:
    """Records in the program's order, and what contention needs to know of the cluster."""

    records: list[Record]
    compute_s: float
    sms: int
    memory_bytes_per_s: float
    compute_slowdown: float
    communication_slowdown: float

    def with_records(self, changed: dict[int, Record]) -> Tape:
        records = [changed.get(i, record) for i, record in enumerate(self.records)]
        return replace(self, records=records, compute_s=sum(r.seconds for r in records if r.kind == COMPUTE))


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
    """Price every record of a program on a cluster. Without a network, every collective is free."""
    records: list[Record] = []
    issue_at: dict[str, int] = {}
    communicators: dict[str, int] = {}
    groups = {}
    total = 0.0
    for i, op in enumerate(program.ops):
        if op.kind == "wait":
            records.append(Record(WAIT, key=issue_at[op.attrs["issue"]]))
        elif op.kind in OPS:
            seconds = compute.op_s(program, op)
            total += seconds
            records.append(Record(COMPUTE, seconds, compute.bound(program, op) == "compute"))
        else:
            issue_at[op.name] = i
            name = communicator(op)
            cost = FREE
            if network is not None:
                if op.axes not in groups:
                    groups[op.axes] = group_of(cluster, program.plan, op.axes)
                cost = network.collective(op.kind, program.payload_bytes(op), groups[op.axes])
            records.append(Record(ISSUE, key=communicators.setdefault(name, len(communicators)), cost=cost))
    return Tape(
        records,
        total,
        cluster.gpu.sms,
        cluster.gpu.memory_bytes_per_s,
        cluster.overlap.compute_slowdown,
        cluster.overlap.communication_slowdown,
    )


class _Flight:
    """One collective in flight."""

    __slots__ = ("cost", "index", "latency", "transfer")

    def __init__(self, index: int, cost: Cost) -> None:
        self.index = index
        self.cost = cost
        self.latency = cost.latency_s
        self.transfer = cost.transfer_s


class _Player:
    """The state between two events."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        count = len(tape.records)
        self.start = [0.0] * count
        self.end = [0.0] * count
        self.ended = bytearray(count)
        self.now = 0.0
        self.queue: deque[int] = deque()
        self.flights: list[_Flight] = []
        self.occupied: set[int] = set()  # communicators with a collective in flight

    def issue(self, index: int) -> None:
        self.queue.append(index)
        self._launch()

    def _launch(self) -> None:
        """Start queued collectives in the order of their issue, as far as their communicators are free."""
        records = self.tape.records
        while self.queue:
            index = self.queue[0]
            record = records[index]
            if record.key in self.occupied:
                return
            self.queue.popleft()
            self.start[index] = self.now
            if record.cost.seconds <= 0.0:
                self.end[index] = self.now
                self.ended[index] = 1
                continue
            self.occupied.add(record.key)
            self.flights.append(_Flight(index, record.cost))

    def compute_rate(self, busy: bool) -> float:
        """Progress of compute for each second, beside what is in flight."""
        tape = self.tape
        held = 0.0
        for flight in self.flights:
            if busy:
                held += flight.cost.sms / tape.sms
            else:
                held += flight.cost.memory_bytes_per_s / tape.memory_bytes_per_s
        return max(1.0 - held * tape.compute_slowdown, 0.1)

    def rates(self, computing: bool) -> list[float]:
        """Progress of every flight for each second: latency runs alone, bytes on one link are shared."""
        if len(self.flights) == 1:
            alone = self.flights[0].latency > 0.0 or not computing
            return [1.0 if alone else 1.0 / self.tape.communication_slowdown]
        moving: dict[str, int] = {}
        for flight in self.flights:
            if flight.latency <= 0.0:
                moving[flight.cost.link] = moving.get(flight.cost.link, 0) + 1
        beside = 1.0 / self.tape.communication_slowdown if computing else 1.0
        return [1.0 if flight.latency > 0.0 else beside / moving[flight.cost.link] for flight in self.flights]

    def advance(self, limit: float, computing: bool) -> float:
        """Move time to the next event of a flight, or by ``limit``. Returns the time that passed."""
        rates = self.rates(computing)
        step = limit
        for flight, rate in zip(self.flights, rates, strict=True):
            left = (flight.latency if flight.latency > 0.0 else flight.transfer) / rate
            if left < step:
                step = left
        self.now += step
        finished = False
        for flight, rate in zip(self.flights, rates, strict=True):
            if flight.latency > 0.0:
                flight.latency -= step
                if flight.latency <= 1e-15:
                    flight.latency = 0.0
                    finished = finished or flight.transfer <= 0.0
            else:
                flight.transfer -= step * rate
                if flight.transfer <= 1e-15:
                    flight.transfer = 0.0
                    finished = True
        if finished:
            self._land()
        return step

    def _land(self) -> None:
        still: list[_Flight] = []
        for flight in self.flights:
            if flight.latency > 0.0 or flight.transfer > 0.0:
                still.append(flight)
                continue
            self.end[flight.index] = self.now
            self.ended[flight.index] = 1
            self.occupied.discard(self.tape.records[flight.index].key)
        self.flights = still
        self._launch()


_FOREVER = float("inf")


def play(tape: Tape) -> Timeline:
    """Run a tape. Raises ValueError when a wait can never end (a program that no runtime could finish either)."""
    player = _Player(tape)
    exposed: dict[int, float] = {}
    busy_s = 0.0
    for i, record in enumerate(tape.records):
        if record.kind == COMPUTE:
            player.start[i] = player.now
            left = record.seconds
            while left > 0.0:
                if not player.flights:
                    player.now += left
                    break
                rate = player.compute_rate(record.busy)
                passed = player.advance(left / rate, True)
                left -= passed * rate
                if left < 1e-15:
                    left = 0.0
            player.end[i] = player.now
            busy_s += player.now - player.start[i]
        elif record.kind == ISSUE:
            player.issue(i)
        else:
            begun = player.now
            player.start[i] = begun
            while not player.ended[record.key]:
                if not player.flights:
                    raise ValueError(f"record {i} waits for collective {record.key}, which never starts")
                player.advance(_FOREVER, False)
            player.end[i] = player.now
            exposed[record.key] = exposed.get(record.key, 0.0) + player.now - begun
    while player.flights:
        player.advance(_FOREVER, False)
    return Timeline(player.now, player.start, player.end, exposed, busy_s)
