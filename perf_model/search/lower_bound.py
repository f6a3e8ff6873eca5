"""Lower bounds of a family's time and memory before anything of it is built (torch-free).

One program serves (``FewBlocks``): under another tp and cp its records have other local sizes, so the compute of a
block can be priced without a pass being run. Compute keeps the builder's order (``defer_weight_gradients`` aside), so
nothing hides a collective but what stands between the record that makes its input and the first that reads its output.
Memory: no rank's share of anything is less than 1 / (tp * cp) of what one rank with all tokens and heads needs. The
bounds only cut the search; tests hold them against built and played steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...errors import CinemeshError
from ...kernels.ops import OPS
from ...model.step import check
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op
from ..prices.models import PriceModels
from ..prices.network import Groups, ring_group
from .extrapolate import Extrapolation, standing_s, taken_of
from .few_blocks import FewBlocks

Recompute = str | tuple[str, ...]


@dataclass(frozen=True)
class _Exchange:
    """A collective over tp or cp in one block: its record, and the compute records that could hide it."""

    index: int
    axis: str
    between: tuple[int, ...]


@dataclass(frozen=True)
class _Sized:
    """A block under degrees of tp and cp: its plan, and seconds of its compute.

    ``moved``: what its exchanges move, each that differs once: axis, record, bytes. ``exchanges``: of every one, which
    of these it moves, and seconds of the compute that could hide it; None where there is none.
    """

    plan: Plan
    compute_s: float
    moved: list[tuple[str, Op, int]]
    exchanges: list[tuple[int, float | None]]


@dataclass(frozen=True)
class _Block:
    """What one more block adds under one recompute mode. ``compute``: records, and the first one that costs as much."""

    step: Extrapolation
    compute: dict[int, int]
    exchanges: tuple[_Exchange, ...]


class LowerBound:
    """Lower bounds of all families of one model on one latent, from a program that serves all degrees."""

    def __init__(self, few: FewBlocks, models: PriceModels) -> None:
        self.models = models
        plain = few.plan.without_overlap()
        self._fused = few.plan.fused_tp  # products hide what they hold: all of it, for what a bound can tell
        self._few, self._plain = few, plain
        self._one = few.on(plain.with_degrees(tp=1, cp=1))
        self._alone: dict[Recompute, Extrapolation] = {}
        self._peaks: dict[tuple[Recompute, int], int] = {}
        self._blocks: dict[tuple[Recompute, int, int], _Block] = {}
        self._of_degrees: dict[tuple[Recompute, int, int], _Sized] = {}

    # -- time -----------------------------------------------------------------------------------------------------

    def step_s(self, recompute: Recompute, plan: Plan, groups: Groups | None = None) -> float:
        """Of all blocks: compute, what nothing hides, and the busier lane where that is longer.

        ``groups``: where the groups over tp and over cp lie; without them, as well as any of their ranks can.
        """
        if self._few.more == 0:  # a model of so few blocks is built whole, and needs no bound
            return 0.0
        sized = self._sized(recompute, plan)
        waited = {"tp": 0.0, "cp": 0.0}
        busy = {"tp": 0.0, "cp": 0.0}
        taken = {"tp": 0.0, "cp": 0.0}
        largest = {"tp": 0.0, "cp": 0.0}  # share of compute that one exchange takes
        exposed = 0.0
        costs: list[tuple[str, float, float]] = []  # axis, seconds, share of compute that is taken
        for axis, op, payload in sized.moved:
            ranks = sized.plan.size(axis)
            group = ring_group(self.models.cluster, ranks) if groups is None else groups[axis,]
            cost = self.models.network.collective(op.kind, payload, group)
            if ctas := sized.plan.ctas(op.axes):  # as fast as without the limit: it slows groups elsewhere by less
                cost = replace(cost, sms=min(cost.sms, ctas))
            costs.append((axis, cost.seconds, taken_of(self.models, sized.plan, cost)))
        for which, hidden_s in sized.exchanges:
            axis, seconds, share = costs[which]
            busy[axis] += seconds
            if axis == "tp" and self._fused:
                continue
            if hidden_s is None:
                exposed += seconds
                continue
            waited[axis] += max(0.0, seconds * (1.0 - share) - hidden_s)
            taken[axis] += seconds * share
            largest[axis] = max(largest[axis], share)
        still = max(exposed, *waited.values())
        least = sized.compute_s + standing_s(still, [(taken[axis], largest[axis]) for axis in taken])
        return max(least, *busy.values()) * self._few.config.layers * plan.micro_batches

    def _sized(self, recompute: Recompute, plan: Plan) -> _Sized:
        """A block under a plan's degrees; made once."""
        key = (recompute, plan.tp, plan.cp)
        if key not in self._of_degrees:
            block = self._block(recompute, plan)
            program = block.step.program
            program = replace(program, plan=block.step.plan.with_degrees(tp=plan.tp, cp=plan.cp))
            priced = {i: self.models.compute.op_s(program, program.ops[i]) for i in {*block.compute.values()}}
            seconds = {i: priced[first] for i, first in block.compute.items()}
            moved: dict[object, tuple[str, Op, int]] = {}
            exchanges: list[tuple[object, float | None]] = []
            for exchange in block.exchanges:
                op = program.ops[exchange.index]
                if program.plan.size(op.axes) > 1:
                    hidden_s = sum(seconds.get(i, 0.0) for i in exchange.between) if exchange.between else None
                    payload = program.payload_bytes(op)
                    moves = (op.kind, op.axes, payload)
                    moved.setdefault(moves, (exchange.axis, op, payload))
                    exchanges.append((moves, hidden_s))
            places = {moves: place for place, moves in enumerate(moved)}
            of = [(places[moves], hidden_s) for moves, hidden_s in exchanges]
            self._of_degrees[key] = _Sized(program.plan, sum(seconds.values()), list(moved.values()), of)
        return self._of_degrees[key]

    def _block(self, recompute: Recompute, plan: Plan) -> _Block:
        """A block with every exchange of a plan's: over two ranks of tp and cp, or over as many as the plan has."""
        two = plan.with_degrees(tp=2, cp=2)
        degrees = two if self._legal(two) else plan
        key = (recompute, degrees.tp, degrees.cp)
        if key not in self._blocks:
            few = self._few.on(self._plain.with_degrees(tp=degrees.tp, cp=degrees.cp))
            step = Extrapolation(few, replace(few.plan, recompute=recompute), self.models)
            program = step.program
            within = [i for loop in step.unrolled(step.plan).loops for i in range(loop.begin, loop.end)]
            first: dict[object, int] = {}
            ops = ((i, program.ops[i]) for i in within)
            compute = {
                i: first.setdefault(_facts(program, op), i)
                for i, op in ops
                if op.kind in OPS and not _over_unit(program, op)
            }
            self._blocks[key] = _Block(step, compute, tuple(self._exchanges(program, within)))
        return self._blocks[key]

    def _legal(self, plan: Plan) -> bool:
        with contextlib.suppress(CinemeshError):
            check(self._few.config, plan, self._few.batch)
            return True
        return False

    def _exchanges(self, program: Program, within: list[int]) -> Iterator[_Exchange]:
        made: dict[str, int] = {}
        read: dict[str, list[int]] = {}
        for i, op in enumerate(program.ops):
            if op.kind in OPS:
                made.update(dict.fromkeys(op.outputs, i))
                for name in op.inputs:
                    read.setdefault(name, []).append(i)
        waits = {op.waits_for: op for op in program.ops if op.is_wait}
        for i in within:
            op = program.ops[i]
            if op.kind in OPS or op.is_wait or op.axes not in (("tp",), ("cp",)):
                continue
            begin = made.get(op.inputs[0], i)
            after = [j for j in read.get(waits[op.name].outputs[0], ()) if j > i]
            end = min(after, default=len(program.ops))
            between = tuple(j for j in range(begin + 1, end) if program.ops[j].kind in OPS)
            yield _Exchange(i, op.axes[0], between)

    # -- memory ---------------------------------------------------------------------------------------------------

    def _one_rank(self, recompute: Recompute) -> Extrapolation:
        if recompute not in self._alone:
            given = self._one.plan  # what is offloaded by hand goes with what is kept by hand
            offload = given.offload if recompute == given.recompute else ()
            plan = replace(given, recompute=recompute, offload=offload)
            self._alone[recompute] = Extrapolation(self._one, plan, self.models)
        return self._alone[recompute]

    def kept_bytes(self, recompute: Recompute) -> int:
        """Of one block, on one rank that holds all tokens and heads."""
        return self._one_rank(recompute).kept_bytes

    def peak_bytes(self, recompute: Recompute, plan: Plan) -> float:
        """Of one rank under a plan's degrees and shard group."""
        ranks = plan.data_ranks if plan.dp_shard * plan.cp == 1 else plan.dp_shard  # one rank alone gathers nothing
        key = (recompute, ranks)
        if key not in self._peaks:
            shards = self._one.plan.with_degrees(dp_shard=ranks)
            self._peaks[key] = self._one_rank(recompute).peak_bytes(shards)
        return self._peaks[key] / (plan.tp * plan.cp)


def _facts(program: Program, op: Op) -> tuple[object, ...]:
    """What a compute op costs under any degrees follows from it."""
    buffers = [program.buffers[name] for name in (*op.inputs, *op.outputs)]
    counted = [op.attrs[name] for name in OPS[op.kind].counted]
    return (op.kind, op.attrs.get("signature"), *counted, *[(b.shape, b.placement, b.dtype) for b in buffers])


def _over_unit(program: Program, op: Op) -> bool:
    """Whether a record reads or writes a whole flat unit: its size is that of the degrees it was laid out for."""
    return any(program.buffers[name].unit and not program.buffers[name].base for name in (*op.inputs, *op.outputs))
