"""No record reads what another has overwritten: views, in-place sums, renamed gradients, collectives in flight.

The builder refuses such reads where it knows the names; the passes move and clone records afterwards, and an elided
collective turns two buffers into one. Parity would see a hazard only if the numbers happened to differ. This walk
proves for every element of every storage, in the order of execution, that a read finds what its name stands for.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cinemesh.kernels.ops import OPS
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.forward import build_velocity
from cinemesh.model.lora import Lora
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.collectives import COLLECTIVES
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program, contiguous_strides
from cinemesh.parallel.ir.records import Op
from cinemesh.parallel.passes.liveness import persistent
from cinemesh.parallel.passes.pipeline import prepare

Runs = tuple[tuple[int, int], ...]


@dataclass
class Segment:
    """Elements ``start`` to ``stop`` of a storage as ``writer`` (a buffer's name) left them; ``in_place``: a sum."""

    start: int
    stop: int
    writer: str
    time: int
    in_place: bool


@dataclass
class Storage:
    segments: list[Segment] = field(default_factory=list)

    def write(self, new: Segment) -> None:
        kept = []
        for old in self.segments:
            if old.start < new.start:
                kept.append(replace(old, stop=min(old.stop, new.start)))
            if old.stop > new.stop:
                kept.append(replace(old, start=max(old.start, new.stop)))
        self.segments = [s for s in kept if s.start < s.stop]
        self.segments.append(new)

    def under(self, start: int, stop: int) -> list[Segment]:
        return [s for s in self.segments if s.start < stop and start < s.stop]

    def covered(self, start: int, stop: int) -> bool:
        return sum(min(s.stop, stop) - max(s.start, start) for s in self.under(start, stop)) == stop - start


class Walk:
    """Executes the names of a program. ``hazards`` are sentences."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.storages: dict[str, Storage] = {}
        self.written: dict[str, int] = {}  # buffer -> when a record wrote it under this very name
        self.flying: dict[str, tuple[str, ...]] = {}  # issue -> the buffers that belong to it until its wait
        self.hazards: list[str] = []
        self.ranges: dict[str, tuple[str, Runs]] = {}
        for name in persistent(program):
            self.write(name, -1, in_place=False)
        for time, op in enumerate(program.ops):
            self.step(op, time)

    def range_of(self, name: str) -> tuple[str, Runs]:
        """The storage, and the runs of neighbouring elements that a buffer holds of it: many, for a strided view."""
        if name not in self.ranges:
            self.ranges[name] = self.find_range(name)
        return self.ranges[name]

    def find_range(self, name: str) -> tuple[str, Runs]:
        root, offset = self.program.root(name)
        shape, strides = self.program.local_shape(name), self.program.local_strides(name)
        if strides == contiguous_strides(shape):
            return root, ((offset, offset + self.program.local_elements(name)),)
        inner = len(shape)  # dims from here on are contiguous together
        while inner and strides[inner - 1] == math.prod(shape[inner:]):
            inner -= 1
        length = math.prod(shape[inner:])
        starts = [
            offset + sum(i * step for i, step in zip(index, strides, strict=False))
            for index in itertools.product(*map(range, shape[:inner]))
        ]
        return root, tuple((start, start + length) for start in starts)

    def ancestors(self, name: str) -> list[str]:
        """The buffer and what it is a view or another name of, nearest first."""
        found, at = [], name
        while at is not None:
            found.append(at)
            at = self.program.buffers[at].base
        return found

    def write(self, name: str, time: int, *, in_place: bool) -> None:
        root, runs = self.range_of(name)
        self.written[name] = time
        for start, stop in runs:
            self.storages.setdefault(root, Storage()).write(Segment(start, stop, name, time, in_place))

    def step(self, op: Op, time: int) -> None:
        if op.kind in COLLECTIVES:
            self.read(op.inputs[0], op, time)
            self.flying[op.name] = (op.inputs[0], *op.outputs)
            return
        if op.is_wait:
            source, *targets = self.flying.pop(op.waits_for)
            for name in targets:
                self.write(name, time, in_place=self.range_of(name) == self.range_of(source))
            self.write(op.outputs[0], time, in_place=False)
            return
        if op.kind == "zero_gaps":  # reads nothing, and what lies between the gaps is for others to write
            root, ((start, _),) = self.range_of(op.outputs[0])
            for first, last in op.attrs["gaps"]:
                self.write_part(root, start + first, start + last, op, time)
            return
        inputs = [self.range_of(name) for name in op.inputs]
        for name in op.inputs:
            self.read(name, op, time)
        for name in op.outputs:
            self.refuse_flying(name, op, written=True)
            self.write(name, time, in_place=self.range_of(name) in inputs)

    def write_part(self, root: str, start: int, stop: int, op: Op, time: int) -> None:
        self.storages.setdefault(root, Storage()).write(Segment(start, stop, op.outputs[0], time, False))

    def refuse_flying(self, name: str, op: Op, *, written: bool) -> None:
        """Nobody reads the result of a collective in flight; nobody writes its source or its result."""
        root, runs = self.range_of(name)
        for issue, (source, *targets) in self.flying.items():
            for held in (source, *targets) if written else targets:
                other, ((first, last),) = self.range_of(held)  # what travels is contiguous
                if root == other and any(start < last and first < stop for start, stop in runs):
                    verb = "writes" if written else "reads"
                    self.hazards.append(f"{op.name} {verb} {name} while {issue} is in flight with {held}")

    def read(self, name: str, op: Op, time: int) -> None:
        root, runs = self.range_of(name)
        self.refuse_flying(name, op, written=False)
        storage = self.storages.setdefault(root, Storage())
        if not all(storage.covered(start, stop) for start, stop in runs):
            self.hazards.append(f"{op.name} reads {name}, parts of which nobody wrote")
        lineage = self.ancestors(name)
        named = next((a for a in lineage if a in self.written), None)  # what the name's value was first written as
        since = -1 if named is None else self.written[named]
        for segment in itertools.chain.from_iterable(storage.under(start, stop) for start, stop in runs):
            if segment.time <= since or segment.writer in lineage:
                continue  # older than the value it became part of, or the value itself
            if named is None and not (segment.in_place and self.range_of(segment.writer) == (root, runs)):
                continue  # never written as one: these are its parts
            self.hazards.append(f"{op.name} reads {name}, which {segment.writer} has overwritten")


def find_hazards(program: Program) -> list[str]:
    return Walk(program).hazards


PLANS = (
    "recompute=none",
    "recompute=full,micro_batches=2",
    "tp=2,cp=2,dp_shard=2,dp_replicate=2,micro_batches=2,prefetch=2",
    "tp=2,prefetch=0,recompute=full",
    "cp=3,dp_replicate=2,recompute=q:kv:o:lse",
    "dp_shard=4,dtype=bf16,micro_batches=3",
    "cp=2,kv_slices=3,recompute=kv_gathered:lse,micro_batches=2",
    "cp=2,dp_shard=2,kv_chunks=3,kv_first=true,grad_units=2,recompute=lse:,micro_batches=2",
    "tp=2,tp_slices=3,recompute=full,recompute_last=selective,last_blocks=1",
    "tp=2,cp=2,dp_shard=2,kv_slices=3,tp_slices=2,defer_weight_gradients=true,grad_units=2,prefetch=2",
    "cp=2,dp_shard=2,grad_units=4,defer_weight_gradients=true,micro_batches=3,recompute=none",
    "tp=2,cp=2,fused_tp=true,recompute=full,micro_batches=2",
    "tp=4,dp_shard=2,fused_tp=true,defer_weight_gradients=true,grad_units=2",
)


def program_of(text: str, backend: str = "gloo", lora: Lora | None = None, **variant: Any) -> Program:
    case = small_case(Plan.parse(text, dtype="float32") if "dtype" not in text else Plan.parse(text), max_procs=16)
    case.config = replace(case.config, lora=lora, **variant)
    return prepare(build_step(case.config, case.plan, case.batch), backend=backend)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("text", PLANS)
def test_no_record_reads_what_was_overwritten(text: str, backend: str) -> None:
    assert find_hazards(program_of(text, backend)) == []


@pytest.mark.parametrize("text", PLANS)
def test_nor_in_the_other_block_under_the_other_objective(text: str) -> None:
    assert find_hazards(program_of(text, block="dit", objective="v-prediction")) == []


@pytest.mark.parametrize("text", PLANS)
def test_nor_beside_frozen_weights(text: str) -> None:
    assert find_hazards(program_of(text, lora=Lora(4, 4.0))) == []


@pytest.mark.parametrize("text", ["tp=1", "tp=2,cp=2,dp_shard=2", "tp=2,cp=2,dp_shard=2,kv_slices=3,tp_slices=3"])
def test_nor_does_the_sampler(text: str) -> None:
    case = small_case(Plan.parse(text, dtype="float32"))
    assert find_hazards(prepare(build_velocity(case.config, case.plan, case.batch), backend="gloo")) == []


# -- planted hazards --------------------------------------------------------------------------------------------------


def index(program: Program, name: str) -> int:
    return next(i for i, op in enumerate(program.ops) if op.name == name)


def moved(program: Program, name: str, behind: str) -> Program:
    ops = list(program.ops)
    op = ops.pop(index(program, name))
    at = next(i for i, other in enumerate(ops) if other.name == behind)
    return program.with_ops([*ops[: at + 1], op, *ops[at + 1 :]])


PLANTED = {
    # The residual stream's gradient is added to in place; one record reads it under its old name afterwards.
    "read after an in-place sum": (
        "tp=1",
        "mb0/blocks.1.backward/dy3",
        "mb0/blocks.1.backward/dx2",
        "which mb0/blocks.1.backward/dx2",
    ),
    # The reduce-scatter of a block's gradient starts before its last gradient was written.
    "reduced too early": ("dp_shard=2", "mb0/blocks.1.backward/dkv_weight", "mb0/blocks.1.backward/reduced", "nobody"),
    # The optimizer updates the master weights, of which one rank's weights are views, before backward has read them.
    "updated too early": ("tp=1", "mb0/blocks.0.backward/dact", "optimizer/master", "which optimizer/master"),
    # A result is read while its collective is in flight.
    "never waited for": ("tp=2", "mb0/blocks.0.forward/h1_gathered.wait", "mb0/blocks.0.forward/q", "in flight"),
}


@pytest.mark.parametrize(("text", "name", "behind", "complaint"), PLANTED.values(), ids=PLANTED)
def test_planted_hazards_are_found(text: str, name: str, behind: str, complaint: str) -> None:
    """A walk that finds nothing anywhere would be content with every program."""
    hazards = find_hazards(moved(program_of(f"{text},prefetch=0,recompute=full"), name, behind))
    assert hazards and any(complaint in hazard for hazard in hazards), hazards


def test_an_alias_of_a_live_buffer_is_found() -> None:
    """What a wrong elision would do: an output written into a storage that is still to be read."""
    program = program_of("tp=1,recompute=none")
    up = program.buffers["mb0/blocks.0.forward/up"]
    program.buffers[up.name] = replace(up, base="mb0/blocks.0.forward/gate")
    hazards = find_hazards(program.with_ops(program.ops))
    assert any("/gate, which mb0/blocks.0.forward/up has overwritten" in hazard for hazard in hazards), hazards


def test_every_kind_of_op_was_walked() -> None:
    kinds = {op.kind for text in PLANS for op in program_of(text).ops}
    kinds |= {op.kind for op in program_of(PLANS[0], lora=Lora(4, 4.0)).ops}
    kinds |= {op.kind for op in program_of(PLANS[0], block="dit", objective="v-prediction").ops}
    assert kinds >= set(COLLECTIVES)
    assert set(OPS) - kinds == {"unpatchify", "weigh", "mark"}  # the sampler's alone; marks: passes/test_mark.py
