"""The step of a peer: when its stack gathers, computes and reduces; played, then extrapolated (torch-free).

fsdp      a unit (block) is gathered one ahead of its use, freed after forward, gathered again in backward; its gradient
          is reduced in every micro-batch. Gathers and reductions share one communicator.
grad_op   as fsdp, but gathered once a micro-batch
zero1     weights are gathered once a step, block by block ahead of the first forward; gradients reduced block by block
          behind the last backward; without overlap both stand alone
ddp       as zero1, with one all-reduce of the gradients and nothing gathered
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..clusters.cluster import Cluster
from ..prices.compute import Compute
from ..prices.network import Network
from ..prices.timeline import WAIT, Record
from .peer_block import Blocks
from .peers import HALF, Run

# Bytes a parameter of a unit that a stack copies beside (a gather, a reduction in half precision, one in fp32):
# fsdp1: gradients concatenated (4), cast to fp32 (6), scaled (4, fp32: 8); fsdp2: copied out (4), in (4, or 6 to fp32)
COPIES = {"none": (0, 0, 0), "fsdp1": (0, 8, 18), "fsdp2": (4, 4, 6)}
STEADY_LAYERS = (3, 5)  # two depths from which the time of one more block follows
STEADY_MICRO_BATCHES = 3


@dataclass(frozen=True)
class PeerPart:
    """Records that a schedule repeats; ``begin``: where the first copy stood, which its waits refer to."""

    records: list[Record]
    begin: int
    compute_s: float
    kernels: int


class Schedule(Blocks):
    """One step of ``layers`` blocks and ``micro_batches`` micro-batches on one tape."""

    def __init__(
        self,
        run: Run,
        compute: Compute,
        network: Network,
        cluster: Cluster,
        layers: int,
        parts: dict[str, PeerPart] | None = None,
    ) -> None:
        super().__init__(run, compute, network, cluster)
        self.layers = layers
        self.parts: dict[str, PeerPart] = (
            {} if parts is None else parts
        )  # emitted once, repeated by schedules of one run
        self.sharded = self.stack.shard in ("fsdp", "grad_op")
        self.block_bytes = self.m.block_parameters / run.tp * (1 if run.fp8_gather else HALF)
        self.end_bytes = self.m.end_parameters / run.tp * HALF
        self.copies = COPIES[self.stack.copies]
        self.block_gradient = self.m.block_parameters / run.tp * self.stack.reduce_bytes
        self.end_gradient = self.m.end_parameters / run.tp * self.stack.reduce_bytes
        self.pending: list[int] = []

    def play(self, micro_batches: int) -> float:
        for i in range(micro_batches):
            first, last = i == 0, i == micro_batches - 1
            self._forward(first)
            self._backward(last)
        for index in self.pending:
            self.r.wait(index)
        self._finish()
        return self.r.play()

    def _host(self, name: str, emit: Callable[[], None]) -> None:
        """A part of the step, at the host's pace where that is slower. Equal parts are emitted once, then repeated."""
        r = self.r
        r.flush()
        begin, seconds, kernels = len(r.records), r.compute_s, r.kernels
        if name not in self.parts:
            emit()
            r.host_bound(seconds, kernels)
            r.flush()
            self.parts[name] = PeerPart(r.records[begin:], begin, r.compute_s - seconds, r.kernels - kernels)
            return
        part = self.parts[name]
        shift = begin - part.begin
        r.records += [replace(x, key=x.key + shift) if x.kind == WAIT else x for x in part.records]
        r.compute_s += part.compute_s
        r.kernels += part.kernels

    def _gather(self, payload_bytes: float) -> int:
        index = self.r.issue("all_gather", payload_bytes, "data")
        if not self.stack.overlap_data:
            self.r.wait(index)
        return index

    def _wait_unit(self, index: int, parameters: float) -> None:
        self.r.wait(index)
        if index >= 0 and self.sharded and self.copies[0]:
            self.r.stream(self.copies[0] * parameters)

    def _reduce(self, payload_bytes: float, last: bool) -> None:
        """A unit's gradient, as its backward is done."""
        overlapped = self.stack.overlap_data
        if self.sharded:
            if copied := self.copies[self.stack.reduce_bytes // HALF]:
                self.r.stream(copied * payload_bytes / self.stack.reduce_bytes, 2)
            self.pending.append(self.r.issue("reduce_scatter", payload_bytes, "data"))
            if not self.stack.overlap_data:
                self.r.wait(self.pending.pop())
            if self.run.replicas > 1:
                self.pending.append(self.r.issue("all_reduce", payload_bytes / self.run.shard, "replicas"))
        elif last and overlapped:
            kind = "reduce_scatter" if self.stack.shard == "zero1" else "all_reduce"
            self.pending.append(self.r.issue(kind, payload_bytes, "data"))

    def _forward(self, first: bool) -> None:
        gathers = self.sharded or (first and self.stack.shard == "zero1" and self.stack.overlap_data)
        ahead = self._gather(self.end_bytes) if gathers else -1
        following = self._gather(self.block_bytes) if gathers else -1
        self._wait_unit(ahead, self.m.end_parameters / self.run.tp)
        if self.m.vocab:
            self._host("embed", self.embed)
        for i in range(self.layers):
            current = following
            if gathers and i + 1 < self.layers:
                following = self._gather(self.block_bytes)
            self._wait_unit(current, self.m.block_parameters / self.run.tp)
            self._host("block", self.block)
        if self.m.vocab:
            self._host("head", self.head)

    def _backward(self, last: bool) -> None:
        regather = self.stack.shard == "fsdp"
        following = -1  # the last block is still there
        for i in range(self.layers):
            current = following
            if regather and i + 1 < self.layers:
                following = self._gather(self.block_bytes)
            self._wait_unit(current, self.m.block_parameters / self.run.tp)
            self._host("block backward", self._block_backward)
            self._reduce(self.block_gradient, last)
        if self.m.vocab:
            self._reduce(self.end_gradient, last)

    def _block_backward(self) -> None:
        if self.run.recomputed:
            self.recompute()
        self.block_backward()

    def _finish(self) -> None:
        """What follows the last backward: reductions that nothing hid, the update, gathers that nothing hides."""
        parameters = (self.layers * self.m.block_parameters + self.m.end_parameters) / self.run.tp
        if not self.sharded and not self.stack.overlap_data:
            kind = "reduce_scatter" if self.stack.shard == "zero1" else "all_reduce"
            self.r.wait(self.r.issue(kind, parameters * self.stack.reduce_bytes, "data"))
        self._host(f"optimizer of {self.layers}", lambda: self.optimizer(self.layers))
        if self.stack.shard == "zero1" and not self.stack.overlap_data:
            self.r.wait(self._gather(parameters * HALF))


def step_s(run: Run, compute: Compute, network: Network, cluster: Cluster) -> float:
    """Seconds of one step: few blocks and micro-batches are played, equal ones beyond them added at the steady rate."""
    parts: dict[str, PeerPart] = {}

    def played(layers: int, micro_batches: int) -> float:
        return Schedule(run, compute, network, cluster, layers, parts).play(micro_batches)

    def deep(micro_batches: int) -> float:
        shallow, deeper = STEADY_LAYERS
        if run.model.layers <= deeper:
            return played(run.model.layers, micro_batches)
        below, above = played(shallow, micro_batches), played(deeper, micro_batches)
        return above + (run.model.layers - deeper) * (above - below) / (deeper - shallow)

    if run.micro_batches <= STEADY_MICRO_BATCHES:
        return deep(run.micro_batches)
    fewer, more = deep(STEADY_MICRO_BATCHES - 1), deep(STEADY_MICRO_BATCHES)
    return more + (run.micro_batches - STEADY_MICRO_BATCHES) * (more - fewer)


def layer_s(run: Run, compute: Compute, network: Network, cluster: Cluster) -> tuple[float, float]:
    """Seconds of one block alone, (forward, backward with its recompute)."""
    forward = Schedule(run, compute, network, cluster, 1)
    forward.block()
    both = Schedule(run, compute, network, cluster, 1)
    both.block()
    both._block_backward()
    before = forward.r.play()
    return before, both.r.play() - before


def attention_s(run: Run, compute: Compute, network: Network, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the attention core alone, (forward, backward), with the communication of its context parallelism."""
    times: list[float] = []
    for direction in ("forward", "backward"):
        blocks = Schedule(run, compute, network, cluster, 1)
        blocks.core(direction)
        times.append(blocks.r.play())
    return times[0], times[1]
