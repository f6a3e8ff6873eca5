"""Marks: before every record at which a rank may wait, where each place begins, at the end; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from harness import Pool

from cinemesh.launch.proof.parity import OPTIMIZER, Case, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.check import check
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Op
from cinemesh.parallel.passes.arena import place
from cinemesh.parallel.passes.device_memory import check_fits
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.parallel.runtime.rehearsal import Rehearsal

PLANS = (
    "dtype=float32",
    "tp=2,cp=2,dp_shard=2,dtype=float32",
    "tp=2,cp=2,dp_replicate=2,micro_batches=3,kv_slices=2,tp_slices=2,grad_units=2,defer_weight_gradients=true",
    "tp=4,cp=2,fused_tp=true,recompute=full,offload=x",
    "dp_shard=2,recompute=none,offload=gate:up",
)
FUSED = ("gather_matmul", "matmul_scatter")


@cache
def prepared(text: str, *, marked: bool) -> Program:
    case = small_case(Plan.parse(text), max_procs=8)
    built = build_step(case.config, case.plan, case.batch, OPTIMIZER, seed=case.seed)
    return prepare(built, backend="nccl", marked=marked, checked=marked)


@pytest.mark.parametrize("text", PLANS)
def test_a_mark_stands_where_a_rank_may_wait_and_where_a_place_begins(text: str) -> None:
    """Counted from outside: the others are the records as they were, in their order."""
    plain, marked = prepared(text, marked=False), prepared(text, marked=True)
    assert [op for op in marked.ops if op.kind != "mark"] == plain.ops
    ops = marked.ops
    before = {i: ops[i - 1].kind == "mark" for i in range(1, len(ops))}
    waiting = [i for i, op in enumerate(ops) if op.is_wait or op.kind in FUSED]
    assert all(before[i] for i in waiting) and ops[-1].kind == "mark"
    first: dict[object, int] = {}
    for i, op in enumerate(ops):
        if op.comm is None and op.kind != "mark":
            first.setdefault((op.place.phase, op.place.micro_batch, op.place.block), i)
    assert all(before[i] for i in first.values())
    blocks = {(phase, block) for phase, _, block in first if block is not None}  # type: ignore[misc]
    assert len(blocks) >= 2 * marked.blocks, "forward and backward of every block"
    assert sum(op.kind == "mark" for op in ops) == len({*waiting, *first.values()}) + 1, "and nowhere else"


@pytest.mark.parametrize("text", PLANS)
def test_a_mark_writes_its_position_and_stands_before_the_record_that_it_says(text: str) -> None:
    program = prepared(text, marked=True)
    for i, op in enumerate(program.ops):
        if op.kind == "mark":
            ((number, output), before) = (*op.inputs, *op.outputs), op.before
            assert (program.root(number), output, before) == (("marks.numbers", i), "marks.slot", i + 1)
    assert {op.before for op in program.ops if op.kind != "mark"} == {None}


def test_a_number_of_every_position_lies_on_the_device_and_the_arena_needs_no_more() -> None:
    text = "tp=2,cp=2,dp_shard=2,dtype=float32"
    plain, marked = prepared(text, marked=False), prepared(text, marked=True)
    one, other = lifetimes(plain), lifetimes(marked)
    assert other.persistent_bytes - one.persistent_bytes == 8 * len(marked.ops)
    assert place(marked).bound_bytes == place(plain).bound_bytes, "how well it is packed depends on positions"
    check_fits(marked, other.persistent_bytes + place(marked).total_bytes + max(other.workspace_bytes))


# -- faults -----------------------------------------------------------------------------------------------------------


def lost(ops: list[Op], at: list[int]) -> None:
    del ops[at[5]]


def the_last_lost(ops: list[Op], at: list[int]) -> None:
    del ops[at[-1]]


def behind_its_record(ops: list[Op], at: list[int]) -> None:
    ops[at[5]], ops[at[5] + 1] = ops[at[5] + 1], ops[at[5]]


def of_another_record(ops: list[Op], at: list[int]) -> None:
    ops[at[5]] = replace(ops[at[5]], before=ops[at[6]].before)


def out_of_order(ops: list[Op], at: list[int]) -> None:
    ops[at[5]], ops[at[6]] = ops[at[6]], ops[at[5]]


def of_another_number(ops: list[Op], at: list[int]) -> None:
    ops[at[5]] = replace(ops[at[5]], inputs=ops[at[4]].inputs)


def into_another_place(ops: list[Op], at: list[int]) -> None:
    ops[at[5]] = replace(ops[at[5]], outputs=ops[at[5]].inputs)


FAULTS: dict[Callable[[list[Op], list[int]], None], str] = {
    lost: "no mark stands before it",
    the_last_lost: "no mark ends it",
    behind_its_record: "no mark stands before it",
    of_another_record: "and is that of record",
    out_of_order: "a step would be told to go back",
    of_another_number: "and writes",
    into_another_place: "to marks.numbers.",
}


@pytest.mark.parametrize(("fault", "told"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_a_mark_that_is_not_where_it_says_is_found(fault: Callable[..., None], told: str) -> None:
    case = small_case(Plan.parse(PLANS[1]), max_procs=8)
    built = build_step(case.config, case.plan, case.batch)
    program = prepare(built, backend="nccl", marked=True)
    assert check(program, built) == []
    ops = list(program.ops)
    fault(ops, [i for i, op in enumerate(ops) if op.kind == "mark"])
    found = check(program.with_ops(ops), built)
    assert any(one.check == "marks" and told in one.what for one in found), found
    assert {one.check for one in found} <= {"marks", "types"}


def test_a_record_that_is_no_mark_may_not_write_to_the_host() -> None:
    program = prepared(PLANS[1], marked=True)
    at = next(i for i, op in enumerate(program.ops) if op.kind == "mark")
    ops = list(program.ops)
    ops[at] = replace(ops[at], kind="copy", attrs={"signature": "n->n"})
    assert any(one.check == "types" and "lies in host memory" in one.what for one in check(program.with_ops(ops)))


# -- as it runs -------------------------------------------------------------------------------------------------------


def steps(case: Case, *, marked: bool) -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
    """Of every rank: its states after three steps, two of them replayed; what the slot said behind each record."""
    mesh = Mesh(case.plan) if case.plan.world_size > 1 else None
    slot = torch.full((1,), -1) if marked else None
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed, slot=slot)
    runner.initialise(probe_values(case.seed))
    said: list[int] = []
    for step in range(3):
        load_batch(case, runner, step)
        if step == 1:
            assert runner.capture("required") is None
            load_batch(case, runner, step)
        said.clear()
        runner.step(1e-2, None if slot is None else lambda _: said.append(int(slot)))
    states = {name: tensor.clone() for name, tensor in runner.buffers.items()}
    if mesh is not None:
        mesh.close()
    return states, said, [i for i, op in enumerate(runner.program.ops) if op.kind == "mark"]


@pytest.mark.parametrize("text", ["dtype=bf16,micro_batches=2", "tp=2,dp_shard=2,dtype=float32,grad_units=2"])
def test_a_replay_with_marks_is_bitwise_one_without_and_tells_how_far_it_is(text: str, pool: Pool) -> None:
    case = small_case(Plan.parse(text))
    ranks = case.plan.world_size
    plain, marked = (pool.run(ranks, both, case, on) for on in (False, True))
    for (states, _, none), (others, said, at) in zip(plain, marked, strict=True):
        assert none == [] and states.keys() == others.keys()
        assert all(torch.equal(states[name], others[name]) for name in states)
        last, wanted = at[-1], list[int]()  # of the step before
        for i in range(len(said)):
            last = i if i in at else last
            wanted.append(last)
        assert said == wanted and said[-1] == len(said) - 1


def both(case: Case, marked: bool) -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
    return steps(case, marked=marked)


def test_marks_of_a_step_are_rehearsed_by_two_of_them() -> None:
    """Numbers lie at multiples of 8 bytes: some of 16, some not."""
    case = small_case(Plan.parse("dtype=float32"))
    slot = torch.zeros(1, dtype=torch.int64)
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, slot=slot)
    chosen = Rehearsal().chosen(runner.program, runner.executor.records)
    assert 1 <= sum(record.op.kind == "mark" for record in chosen) <= 2
