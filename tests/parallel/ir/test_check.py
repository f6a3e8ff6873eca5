"""Faults planted into what the passes return are found by ``check`` and ``disjoint``, not left to parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest

from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.check import check, disjoint
from cinemesh.parallel.ir.layout import Placement
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Op
from cinemesh.parallel.passes.arena import Arena, place
from cinemesh.parallel.passes.pipeline import passes

PLANS = {
    "recompute": "tp=2,cp=2,dp_shard=2,recompute=full,prefetch=2",
    "replicas": "dp_replicate=2,dp_shard=2,grad_units=2,micro_batches=2",
    "slices": "tp=2,cp=2,dp_shard=2,kv_slices=3,tp_slices=2,grad_units=2,prefetch=2,defer_weight_gradients=true",
    "chunks": "tp=2,cp=2,kv_chunks=2,kv_first=true,recompute=none,micro_batches=2",
    "fused": "tp=2,cp=2,fused_tp=true,recompute=full,recompute_last=selective,last_blocks=1",
    "alone": "tp=1",
    "host": "tp=2,cp=2,kv_slices=3,tp_slices=2,grad_units=2,recompute=selective,offload=kv:q:o:gate:y1,micro_batches=2",
}
CONFIG = replace(preset("tiny"), layers=3)
SHAPE = BatchShape(2, (6, 4, 12))


@dataclass(frozen=True)
class Stage:
    """A program behind one pass, and the program that was built."""

    name: str
    program: Program
    built: Program


@cache
def stages(text: str, backend: str = "gloo") -> tuple[Stage, ...]:
    built = program = build_step(CONFIG, Plan.parse(text), SHAPE)
    found = [Stage("built", built, built)]
    for run in passes(built.plan, backend=backend):
        program = run(program)
        found.append(Stage(run.__name__, program, built))
    return tuple(found)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("text", PLANS.values(), ids=PLANS)
def test_what_the_passes_return_holds(text: str, backend: str) -> None:
    found = stages(text, backend)
    for stage in found:
        assert check(stage.program, stage.built) == [], stage.name
    last = found[-1].program
    arena = place(last)
    assert disjoint(last, arena.offsets, arena.total_bytes) == []


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tp=4,cp=2,dp_shard=768,recompute=full,kv_slices=3,tp_slices=4,grad_units=2"])
def test_the_30b_step_holds(text: str) -> None:
    model = "movie-gen-30b"
    built = program = build_step(preset(model), Plan.parse(text), BatchShape(1, USUAL_LATENTS[model]))
    for run in passes(built.plan, backend="nccl"):
        program = run(program)
    assert check(program, built) == []


# -- planted faults ---------------------------------------------------------------------------------------------------

Fault = Callable[[Program, int], Program]


def at(program: Program, wanted: Callable[[Op], bool], which: int) -> int:
    """The position of one of the records that are wanted, from the middle on."""
    found = [i for i, op in enumerate(program.ops) if wanted(op)]
    return found[(len(found) // 2 + which) % len(found)]


def moved(program: Program, i: int, to: int) -> Program:
    ops = list(program.ops)
    op = ops.pop(i)
    ops.insert(to if to < i else to - 1, op)
    return program.with_ops(ops)


def without(program: Program, i: int) -> Program:
    return program.with_ops([*program.ops[:i], *program.ops[i + 1 :]])


def drop_a_wait(program: Program, which: int) -> Program:
    return without(program, at(program, lambda op: op.is_wait, which))


def wait_twice(program: Program, which: int) -> Program:
    i = at(program, lambda op: op.is_wait, which)
    return program.with_ops([*program.ops[: i + 1], program.ops[i], *program.ops[i + 1 :]])


def issue_before_its_input_is_written(program: Program, which: int) -> Program:
    """Before the last record that writes what it sends."""
    written = {program.root(name)[0] for op in program.ops if not op.comm for name in op.outputs}
    i = at(program, lambda op: op.is_issue and program.root(op.inputs[0])[0] in written, which)
    sent = program.ops[i].inputs[0]
    _, first, last = program.span(sent)

    def writes(op: Op) -> bool:
        spans = [program.span(name) for name in op.outputs if program.root(name)[0] == program.root(sent)[0]]
        return any(a < last and first < z for _, a, z in spans)

    return moved(program, i, max(k for k in range(i) if writes(program.ops[k])))


def read_before_the_wait(program: Program, which: int) -> Program:
    read = {name: k for k, op in reversed([*enumerate(program.ops)]) for name in op.inputs}
    i = at(program, lambda op: op.is_wait and op.outputs[0] in read, which)
    return moved(program, i, read[program.ops[i].outputs[0]] + 1)


def alias_two_live_buffers(program: Program, which: int) -> Program:
    """What one record makes lies where an input of it lies that somebody reads later."""
    last = {name: k for k, op in enumerate(program.ops) for part in op.parts for name in part.inputs}

    def may_be(op: Op) -> bool:
        return op.kind == "matmul" and program.buffers[op.outputs[0]].base is None and bool(victims(op))

    def victims(op: Op) -> list[str]:
        k = program.ops.index(op)
        size = program.bytes(op.outputs[0])
        return [
            name
            for name in op.inputs
            if last[name] > k and size <= program.bytes(name) and not program.buffers[name].strides
        ]

    op = program.ops[at(program, may_be, which)]
    made = program.buffers[op.outputs[0]]
    return program.with_ops(program.ops, {made.name: replace(made, base=victims(op)[0], offset=0)})


def call_a_partial_whole(program: Program, which: int) -> Program:
    live = {axis for axis, size in program.sizes.items() if size > 1}

    def partial(op: Op) -> bool:
        return not op.comm and bool(program.buffers[op.outputs[0]].placement.partial & live)

    made = program.buffers[program.ops[at(program, partial, which)].outputs[0]]
    return program.with_ops(program.ops, {made.name: replace(made, placement=Placement(made.placement.dims))})


def drop_an_addend(program: Program, which: int) -> Program:
    """A record that adds into its output forgets what was there."""
    i = at(program, lambda op: op.kind in ("matmul", "add", "sum_to", "accumulate") and adds(program, op), which)
    op = program.ops[i]
    return program.with_ops([*program.ops[:i], replace(op, inputs=op.inputs[:-1]), *program.ops[i + 1 :]])


def adds(program: Program, op: Op) -> bool:
    return len(op.inputs) > len(program.label_signature(op).inputs)


def drop_a_record(program: Program, which: int) -> Program:
    return without(program, at(program, lambda op: op.kind in ("sum_to", "gated_residual_backward"), which))


def read_the_neighbour(program: Program, which: int) -> Program:
    """Backward of one block reads what another one kept."""
    kept = [op for op in program.ops if op.kind == "swiglu_backward"]
    a, b = kept[which % len(kept)], kept[(which + 1) % len(kept)]
    i = program.ops.index(a)
    swapped = replace(a, inputs=(a.inputs[0], *b.inputs[1:]))
    return program.with_ops([*program.ops[:i], swapped, *program.ops[i + 1 :]])


FAULTS: tuple[Fault, ...] = (
    drop_a_wait,
    wait_twice,
    issue_before_its_input_is_written,
    read_before_the_wait,
    alias_two_live_buffers,
    call_a_partial_whole,
    drop_an_addend,
    drop_a_record,
    read_the_neighbour,
)


@pytest.mark.parametrize("which", [0, 7])
@pytest.mark.parametrize("text", [PLANS["recompute"], PLANS["slices"], PLANS["chunks"]], ids=["r", "s", "c"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_behind_every_pass(fault: Fault, text: str, which: int) -> None:
    for stage in stages(text):
        broken = fault(stage.program, which)
        assert check(broken, stage.built) != [], stage.name


def test_a_part_is_another_than_the_one_between_whose_elements_it_lies() -> None:
    """Two records make two strided parts of one buffer, and one of them is read in place of the other.

    A part that is taken for more than it is would hold both values.
    """
    for stage in stages(PLANS["slices"]):
        program = stage.program
        views: dict[tuple[object, ...], list[str]] = {}
        made = {name for op in program.ops if not op.comm for name in op.outputs}
        for name in sorted({name for op in program.ops if not op.comm for name in op.inputs} & made):
            buffer = program.buffers[name]
            if buffer.strides is not None:
                views.setdefault((program.root(name)[0], buffer.shape, buffer.strides), []).append(name)
        alike = max(views.values(), key=len)
        assert len(alike) > 1, stage.name
        one, other = alike[:2]
        ops = [
            replace(op, inputs=tuple(other if name == one else name for name in op.inputs)) if not op.comm else op
            for op in program.ops
        ]
        assert check(program.with_ops(ops), stage.built) != [], (stage.name, one)


@pytest.mark.parametrize(
    ("lost", "reader", "read"),
    [
        ("x1.t1", "x1_gathered.t1 (all_gather)", "x1.t1"),
        ("cross_q.t0", "cross_o (cross_attention)", "cross_q"),  # the whole, of which a part is not there
        ("kv.t1", "kv_slice.h1 (copy)", "kv.h1"),
    ],
)
def test_who_reads_what_nobody_wrote_is_named(lost: str, reader: str, read: str) -> None:
    """That a record is lost is found by other checks too; only this one says who reads what lay there by chance."""
    stage, block = stages(PLANS["slices"])[0], "mb0/blocks.1.forward/"
    (i,) = [i for i, op in enumerate(stage.program.ops) if op.name == block + lost]
    found = {(finding.op, finding.what) for finding in check(without(stage.program, i), stage.built)}
    assert (block + reader, f"reads {block}{read}, of which not all is written") in found


def early(program: Program, arena: Arena) -> Arena:
    """What a collective sends is given away between its issue and its wait."""
    i = at(program, lambda op: op.kind == "reduce_scatter", 0)
    op = program.ops[i]
    wait = next(k for k, other in enumerate(program.ops) if other.is_wait and other.waits_for == op.name)
    assert wait > i + 1
    held = program.root(op.inputs[0])[0]
    taken = next(
        root
        for k in range(i + 1, wait)
        for name in program.ops[k].outputs
        if (root := program.root(name)[0]) in arena.offsets and root != held and root not in op.outputs
    )
    return replace(arena, offsets={**arena.offsets, taken: arena.offsets[held]})


def overlapping(program: Program, arena: Arena) -> Arena:
    first, second = (program.root(program.ops[i].outputs[0])[0] for i in (60, 61))
    return replace(arena, offsets={**arena.offsets, second: arena.offsets[first]})


def too_small(program: Program, arena: Arena) -> Arena:
    return replace(arena, total_bytes=arena.total_bytes - 256)


@pytest.mark.parametrize("fault", [early, overlapping, too_small], ids=lambda fault: fault.__name__)
def test_storages_that_live_together_share_no_byte(fault: Callable[[Program, Arena], Arena]) -> None:
    """Free between issue and wait is one of them: lifetimes that ended too early would pack so."""
    program = stages(PLANS["slices"])[-1].program
    arena = fault(program, place(program))
    assert disjoint(program, arena.offsets, arena.total_bytes) != []
