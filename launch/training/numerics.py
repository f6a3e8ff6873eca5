"""Numbers of one step: how large values are, block by block, and the first record whose values are not finite.

A step is run as it is, and after every record its outputs are measured, on the device, into one table: nothing of the
step changes, no rank waits. A captured CUDA graph has no place to look: such a step runs from the executor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.runner import StepRunner
from ...parallel.ir.layout import BATCH
from ...parallel.ir.plan import Plan
from ...parallel.ir.records import Op, Phase
from ...parallel.ir.units import nested_index
from ...parallel.runtime.comm import gather_at_first
from ...parallel.runtime.executor import BoundRecord
from .telemetry import Telemetry

NUMERICS_FILE = "numerics.jsonl"
PART_ELEMENTS = 1 << 24  # measured at once: its temporaries are four times 64 MiB


@dataclass(frozen=True)
class Magnitude:
    """Of values that are finite: the largest magnitude; how many, and the sum of their squares."""

    amax: float
    squares: float
    elements: int

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.elements) if self.elements else 0.0


@dataclass(frozen=True)
class Bad:
    """The first record of a rank whose output holds what is not finite. ``index``: its place in the program."""

    index: int
    record: str
    kind: str
    micro_batch: int | None
    count: int
    elements: int


@dataclass(frozen=True)
class RankNumbers:
    """One rank's part of a step.

    Of each block: the residual stream behind it, and the largest magnitude in its q and its k. Of each unit: the
    reduced gradient, of this rank's shard.
    """

    residual: list[Magnitude]
    q: list[float]
    k: list[float]
    gradient: dict[str, Magnitude]
    bad: Bad | None


@dataclass(frozen=True)
class _Row:
    """What one row of the table is of: an output of a record, or something that a record reads."""

    record: int
    value: Tensor


class _Numbers(NamedTuple):
    """One row of the table."""

    amax: float
    squares: float
    not_finite: float


class Numerics:
    """Measures steps of one runner: give :meth:`watch` to ``StepRunner.step``, then ask :meth:`measured`."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        records = runner.executor.records
        rows = [_Row(i, value) for i, record in enumerate(records) for value in _made(record)]
        self._made = len(rows)
        self._q, self._k, self._unit = dict[int, list[int]](), dict[int, list[int]](), dict[str, int]()
        for i, record in enumerate(records):
            op = record.op
            if op.kind == "attention" and not op.clone and op.place.block is not None:
                q, kv = record.inputs[:2]
                for of, value in ((self._q, q), (self._k, kv[:, :, 0])):
                    of.setdefault(op.place.block, []).append(len(rows))
                    rows.append(_Row(i, value))
            if op.kind == "adamw":
                flat = record.inputs[4].view(-1)
                for unit in runner.units.units:
                    self._unit[unit.name] = len(rows)
                    rows.append(_Row(i, flat[unit.flat_offset : unit.flat_offset + unit.shard_elements]))
        self.rows = rows
        self._by_record: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            self._by_record.setdefault(row.record, []).append(number)
        self._residual = _residual_rows(records, rows[: self._made], runner.config.layers)
        self.table = torch.zeros(len(rows), len(_Numbers._fields), dtype=torch.float64, device=runner.executor.device)

    def watch(self, index: int) -> None:
        """Measure what record ``index`` made."""
        for number in self._by_record.get(index, ()):
            measure_into(self.rows[number].value, self.table[number])

    def measured(self) -> RankNumbers:
        """Of the step that was watched last; the host waits for it."""
        table = [_Numbers(*row) for row in self.table.tolist()]

        def size(numbers: Sequence[int]) -> Magnitude:
            return Magnitude(
                max((table[n].amax for n in numbers), default=0.0),
                sum(table[n].squares for n in numbers),
                sum(self.rows[n].value.numel() - int(table[n].not_finite) for n in numbers),
            )

        blocks = range(self.runner.config.layers)
        return RankNumbers(
            [size(self._residual[block]) for block in blocks],
            [size(self._q[block]).amax for block in blocks],
            [size(self._k[block]).amax for block in blocks],
            {unit: size([number]) for unit, number in self._unit.items()},
            next((self._bad(n, table[n]) for n in range(self._made) if table[n].not_finite), None),
        )

    def _bad(self, number: int, row: _Numbers) -> Bad:
        found = self.rows[number]
        op = self.runner.executor.records[found.record].op
        return Bad(found.record, op.name, op.kind, op.place.micro_batch, int(row.not_finite), found.value.numel())


def _made(record: BoundRecord) -> Iterator[Tensor]:
    """Outputs that hold values once the record has run.

    An issue's come with its wait; what makes room for a gradient writes gaps alone; the update makes states.
    """
    op = record.op
    if not op.is_issue and op.place.phase is not Phase.GRADIENT and op.kind != "adamw":
        yield from (value for value in record.outputs if value.is_floating_point())


def _residual_rows(records: list[BoundRecord], rows: list[_Row], layers: int) -> list[list[int]]:
    """Of each block the rows of what it hands on, of all micro-batches and token slices."""
    last: dict[int, Op] = {}
    for op in (record.op for record in records):
        block = op.place.block
        if op.kind == "gated_residual" and op.place.phase is Phase.FORWARD and not op.clone and block is not None:
            last[block] = op
    found: list[list[int]] = [[] for _ in range(layers)]
    for number, row in enumerate(rows):
        op = records[row.record].op
        block = op.place.block
        if block in last and not op.clone and (op.kind, op.role) == (last[block].kind, last[block].role):
            found[block].append(number)
    return found


def measure_into(value: Tensor, row: Tensor) -> None:
    """Put the largest finite magnitude, the sum of finite squares and the count of what is not into ``row`` [3]."""
    row.zero_()
    amax, squares, not_finite = row
    per = max(1, PART_ELEMENTS // max(1, value.numel() // len(value))) if value.dim() and len(value) else 1
    for part in value.split(per) if value.dim() else (value,):
        finite = part.isfinite()
        kept = torch.where(finite, part, 0).to(torch.promote_types(part.dtype, torch.float32))
        if kept.numel():
            amax.copy_(torch.maximum(amax, kept.abs().amax().double()))
        squares += kept.square().sum(dtype=torch.float64)
        not_finite += part.numel() - finite.sum()


@dataclass(frozen=True)
class BadAt:
    """The first record of all ranks whose output is not finite, and the first rank of those where it is."""

    bad: Bad
    rank: int
    coordinates: dict[str, int]

    def line(self, plan: Plan, ids: Sequence[int]) -> str:
        """For the log; ``ids`` are those of the step's global batch, micro-batch after micro-batch."""
        bad, at = self.bad, ", ".join(f"{axis} {index}" for axis, index in self.coordinates.items())
        where = f"rank {self.rank} ({at})"
        if bad.micro_batch is None:
            samples = list(ids)
        else:
            share = len(ids) // plan.micro_batches
            samples = list(ids[bad.micro_batch * share : (bad.micro_batch + 1) * share])
            share //= plan.data_ranks
            first = nested_index(plan, BATCH, self.coordinates) * share
            samples = samples[first : first + share]
        return (
            f"first not finite: {bad.record} ({bad.kind}), {bad.count:,} of {bad.elements:,} values on {where}; "
            f"samples {samples}"
        )


@dataclass(frozen=True)
class StepNumbers:
    """All ranks' part of a step together."""

    residual: list[Magnitude]
    logits: list[float]  # of each block, no |q k^T| / sqrt(K) is above it
    gradient: dict[str, Magnitude]
    bad: BadAt | None

    def line(self) -> str:
        """For the log: where values are largest."""
        residual = max(range(len(self.residual)), key=lambda block: self.residual[block].amax)
        logits = max(range(len(self.logits)), key=lambda block: self.logits[block])
        unit = max(self.gradient, key=lambda name: self.gradient[name].amax)
        return (
            f"largest: residual {self.residual[residual].amax:.3g} (block {residual}), logits at most "
            f"{self.logits[logits]:.3g} (block {logits}), gradient {self.gradient[unit].amax:.3g} ({unit})"
        )

    def values(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "residual": [{"amax": s.amax, "rms": s.rms} for s in self.residual],
            "logits": self.logits,
            "gradient": {name: {"amax": s.amax, "rms": s.rms} for name, s in self.gradient.items()},
            "bad": None if self.bad is None else asdict(self.bad),
        }

    def tell(self, telemetry: Telemetry, step: int, plan: Plan, ids: Sequence[int]) -> None:
        """In the file, the log, and, where all is finite, as charts of the largest of all blocks."""
        telemetry.append(NUMERICS_FILE, {"step": step} | self.values())
        telemetry.say(f"step {step}: {self.line() if self.bad is None else self.bad.line(plan, ids)}")
        if self.bad is None:
            scalars = {
                "numerics/residual": max(s.amax for s in self.residual),
                "numerics/logits": max(self.logits),
                "numerics/gradient": max(s.amax for s in self.gradient.values()),
            }
            telemetry.scalars(step, scalars)


def gathered(measured: RankNumbers, runner: StepRunner) -> StepNumbers | None:
    """Of every rank's part, on rank 0; None elsewhere. Collective."""
    mine = (measured, runner.coordinates)
    said: list[Any] | None = gather_at_first(mine) if runner.mesh else [mine]
    return None if said is None else combined(said, runner.config.head_dim)


def combined(said: Sequence[tuple[RankNumbers, dict[str, int]]], head_dim: int) -> StepNumbers:
    """Of (part, coordinates) by rank. Gradients over dp_replicate are equal, and counted once."""
    parts = [part for part, _ in said]
    shards = [part for part, at in said if not at["dp_replicate"]]
    bads = [(part.bad.index, rank) for rank, part in enumerate(parts) if part.bad is not None]
    first = None
    if bads:
        _, rank = min(bads)
        bad = parts[rank].bad
        assert bad is not None
        first = BadAt(bad, rank, said[rank][1])
    q, k = ([max(of) for of in zip(*(getattr(part, name) for part in parts), strict=True)] for name in ("q", "k"))
    return StepNumbers(
        [_together(of) for of in zip(*(part.residual for part in parts), strict=True)],
        [head_dim * a * b / math.sqrt(head_dim) for a, b in zip(q, k, strict=True)],
        {name: _together([part.gradient[name] for part in shards]) for name in shards[0].gradient},
        first,
    )


def _together(sizes: Sequence[Magnitude]) -> Magnitude:
    return Magnitude(max(s.amax for s in sizes), sum(s.squares for s in sizes), sum(s.elements for s in sizes))
