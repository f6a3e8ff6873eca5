"""Passes that move records: how many gathered units live at once, what degree 1 leaves, what gloo needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.elide import elide
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.passes.prefetch import prefetch
from cinemesh.parallel.passes.recompute import rematerialize
from cinemesh.parallel.passes.staging import stage_for_gloo
from cinemesh.parallel.runtime import ledger

FSDP_LANE = "dp_shard*cp"


def built(layers: int = 5, **fields: object) -> Program:
    plan = replace(Plan(dtype="float32"), **fields)  # pyright: ignore[reportArgumentType]
    case = small_case(plan, max_procs=16)
    return rematerialize(build_step(replace(case.config, layers=layers), plan, case.batch))


def gathered_alive(program: Program) -> list[int]:
    """Gathered units alive at every record. The replicated unit, gathered once a step over more axes, is no part."""
    lives = lifetimes(program)
    units = {program.root(op.outputs[0])[0] for op in program.ops if op.kind == "all_gather" and op.lane == FSDP_LANE}
    alive: set[str] = set()
    counts = []
    for i in range(len(program.ops)):
        alive |= units & set(lives.allocate[i])
        counts.append(len(alive))
        alive -= set(lives.free[i])
    return counts


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_prefetch_bounds_the_gathered_units(depth: int, recompute: str) -> None:
    program = prefetch(built(dp_shard=2, prefetch=depth, recompute=recompute, micro_batches=2))
    counts = gathered_alive(program)
    # The conditioning is read by no block, but its gathered weights are gone after the embedding: it counts like one.
    assert max(counts) == depth + 1


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_prefetch_puts_compute_between_issue_and_wait(depth: int) -> None:
    program = prefetch(built(dp_shard=2, prefetch=depth))
    position = {op.name: i for i, op in enumerate(program.ops)}
    waits = {op.waits_for: i for i, op in enumerate(program.ops) if op.is_wait}
    gathers = [op.name for op in program.ops if op.kind == "all_gather" and op.lane == FSDP_LANE]
    assert len(gathers) == 5 + 1 + 4 + 1, "forward: 5 blocks and the conditioning; backward: all but the last block"
    hidden = [any(op.lane == "compute" for op in program.ops[position[name] + 1 : waits[name]]) for name in gathers]
    assert hidden == [depth > 0 and k > 0 for k in range(len(gathers))]


def by_communicator(program: Program) -> dict[tuple[str, bool], list[str]]:
    """Collectives in order; gathers and reductions of units have communicators of their own."""
    found: dict[tuple[str, bool], list[str]] = {}
    for op in program.ops:
        if op.comm is not None and not op.is_wait:
            key = (op.lane, op.lane == FSDP_LANE and op.kind == "all_gather")
            found.setdefault(key, []).append(op.name)
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prefetch_keeps_the_order_of_every_communicator(depth: int) -> None:
    """A unit that is needed next never stands behind one that is needed later."""
    before = built(tp=2, cp=2, dp_shard=2, prefetch=depth)
    after = prefetch(before)
    assert by_communicator(after) == by_communicator(before)
    assert sorted(op.name for op in after.ops) == sorted(op.name for op in before.ops)
    assert [op.name for op in after.ops] != [op.name for op in before.ops]


def test_the_program_knows_no_rank() -> None:
    """No record carries a coordinate: order and shapes are one for all ranks; data offsets are the executor's."""
    program = prepare(built(tp=2, cp=2, dp_shard=2), backend="gloo")
    assert not any("rank" in op.attrs for op in program.ops)
    axes = {key for op in program.ops for key in op.attrs if key.endswith("_axes")}
    assert axes == {"rank_axes", "shard_axes"}


def test_elide_leaves_only_collectives_that_move_something() -> None:
    program = elide(built(tp=2))
    left = [op for op in program.ops if op.comm is not None]
    assert left and all(program.plan.size(op.axes) > 1 for op in left)
    assert {op.lane for op in left} == {"tp", "dp_shard*cp*tp", "dp_replicate*dp_shard*cp*tp"}
    nothing = elide(built())
    assert not any(op.comm is not None for op in nothing.ops)


def test_elided_gathers_take_no_memory_of_their_own() -> None:
    program = elide(built())
    for name in ("mb0/blocks.0.weights/flat", "mb0/blocks.0.forward/h1_gathered", "mb0/blocks.0.forward/kv_gathered"):
        root, _ = program.root(name)
        assert root != name and "flat" not in root and "gathered" not in root


def test_elided_reductions_still_reach_the_flat_gradient() -> None:
    """Where the result has a place of its own an alias would leave that place unwritten: it is copied."""
    program = elide(built())
    copies = [op for op in program.ops if op.kind == "copy"]
    assert {program.root(op.outputs[0])[0] for op in copies} == {"gradient"}
    assert len(copies) == 5 + 1 + 1  # blocks, conditioning, replicated


def test_staging_is_as_large_as_what_is_scattered_and_only_gloos() -> None:
    program = elide(built(tp=2, cp=2))
    staged = stage_for_gloo(program)
    scatters = [op for op in staged.ops if op.kind == "reduce_scatter"]
    assert scatters and all(len(op.outputs) == 2 for op in scatters)
    for op in scatters:
        assert staged.bytes(op.outputs[1]) == staged.bytes(op.inputs[0])
        wait = next(w for w in staged.ops if w.is_wait and w.waits_for == op.name)
        assert op.outputs[1] in wait.inputs, "gloo writes it until the wait"
    assert ledger.expected(staged) == ledger.expected(program)
    assert not any(name.endswith(".staging") for name in prepare(built(tp=2), backend="nccl").buffers)
