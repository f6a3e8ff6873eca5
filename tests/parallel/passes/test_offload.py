"""Offload: what goes to the host, when, and what of it a device holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.forward import build_velocity
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.check import check, disjoint
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import COMPUTE_LANE, Phase, Space
from cinemesh.parallel.passes.arena import place
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare

LAYERS = 5
SCHEDULED = "tp=2,cp=2,dp_shard=2,grad_units=2,kv_slices=3,tp_slices=3,defer_weight_gradients=true,micro_batches=2"


def built(text: str) -> Program:
    plan = Plan.parse(text, dtype="float32")
    case = small_case(plan)
    return build_step(replace(case.config, layers=LAYERS), plan, case.batch)


def prepared(text: str) -> Program:
    return prepare(built(text), backend="nccl", checked=True)


def alive(program: Program, wanted: Callable[[str], bool]) -> list[int]:
    """How many of the wanted storages of the device live at every record."""
    lives, count, counts = lifetimes(program), 0, []
    for taken, given in zip(lives.allocate, lives.free, strict=True):
        count += sum(map(wanted, taken))
        counts.append(count)
        count -= sum(map(wanted, given))
    return counts


@pytest.mark.parametrize(
    "text", ["recompute=selective", f"recompute=selective,{SCHEDULED}"], ids=["plain", "scheduled"]
)
def test_every_block_but_the_last_goes_out_once_and_comes_back_once(text: str) -> None:
    program = prepared(f"{text},offload=gate:up")
    for kind in ("to_host", "from_host"):
        blocks = [(op.place.micro_batch, op.place.block, op.role) for op in program.ops if op.kind == kind]
        batches = range(program.plan.micro_batches)
        wanted = [(mb, b, f"{role}.{kind}") for mb in batches for b in range(LAYERS - 1) for role in ("gate", "up")]
        parts = program.plan.tp_slices if "gate.t0" in str([op.inputs for op in program.ops]) else 1
        assert sorted(set(blocks)) == sorted(wanted) and len(blocks) in (len(wanted), parts * len(wanted))


@pytest.mark.parametrize(
    "text", ["recompute=selective", f"recompute=selective,{SCHEDULED}"], ids=["plain", "scheduled"]
)
def test_a_device_holds_what_one_block_keeps(text: str) -> None:
    """A copy that is waited for too late, or brought back too early, is right: only here does it show, as memory."""
    program = prepared(f"{text},offload=gate")

    def gates(name: str) -> bool:
        return program.buffers[name].role == "gate" and program.buffers[name].place.block is not None

    assert max(alive(program, gates)) == 2, "one that is used, and one on its way"
    assert max(alive(prepared(text), gates)) == LAYERS


def test_copies_have_compute_to_hide_behind() -> None:
    """Of a whole block: prefetch that is forgotten would make every copy wait."""
    program = prepared("recompute=selective,offload=gate")
    issued: dict[str, int] = {}
    blocks: dict[str, list[int]] = {"to_host": [], "from_host": []}
    for i, op in enumerate(program.ops):
        if op.kind in blocks:
            issued[op.name] = i
        elif op.is_wait and op.waits_for in issued:
            between = program.ops[issued[op.waits_for] + 1 : i]
            kinds = [other.kind for other in between if other.lane == COMPUTE_LANE and not other.clone]
            attention = "attention" if op.lane == "to_host" else "attention_backward"
            blocks[op.lane].append(kinds.count(attention))
    assert blocks == {"to_host": [1] * (LAYERS - 1), "from_host": [1] * (LAYERS - 1)}


def test_the_host_holds_every_offloaded_block_and_the_device_that_much_less() -> None:
    program, plain = prepared("recompute=selective,offload=gate:up"), prepared("recompute=selective")
    each = sum(plain.bytes(f"mb0/blocks.0.forward/{role}") for role in ("gate", "up"))
    on_host = lifetimes(program, Space.HOST)
    assert on_host.peak_bytes == (LAYERS - 1) * each
    assert place(program, on_host).total_bytes == (LAYERS - 1) * each  # 256-byte sizes here
    before, now = lifetimes(plain), lifetimes(program)
    turn, was = (next(i for i, op in enumerate(p.ops) if op.kind == "velocity_loss_backward") for p in (program, plain))
    assert before.live_bytes[was] - now.live_bytes[turn] == (LAYERS - 1) * each
    assert now.peak_bytes < before.peak_bytes
    arena = place(program, on_host)
    assert disjoint(program, arena.offsets, arena.total_bytes, Space.HOST) == []
    one, other, *_ = arena.offsets
    shared = arena.offsets | {one: arena.offsets[other]}
    assert disjoint(program, shared, arena.total_bytes, Space.HOST) != []


def test_the_last_blocks_keep_their_own() -> None:
    program = prepared("recompute=selective,recompute_last=none,last_blocks=3,offload=q")
    assert {op.place.block for op in program.ops if op.kind == "to_host"} == {0, 1}


def test_the_stream_itself_may_go() -> None:
    """With ``full`` the block's output is all that lives; it is used by the next block last."""
    program = prepared("recompute=full,offload=x,micro_batches=2")
    assert sum(op.kind == "to_host" for op in program.ops) == 2 * (LAYERS - 1)


def test_a_forward_alone_keeps_nothing_and_stays() -> None:
    case = small_case(Plan.parse("offload=gate", dtype="float32"))
    velocity = build_velocity(case.config, case.plan, case.batch)
    assert not any(op.to for op in prepare(velocity, backend="gloo").ops)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recompute=full,offload=gate", "plan: offload names gate, which no block keeps for backward"),
        ("recompute=none,offload=x", "plan: offload names x, which no block keeps for backward"),
        ("offload=gates", r"plan: offload names \['gates'\], which no block has; choose from act"),
        ("offload=gate:gate", "list activations, each once"),
        (
            f"recompute_last=none,last_blocks={LAYERS},offload=gate",
            rf"with last_blocks\({LAYERS}\) of {LAYERS} blocks leaves no block",
        ),
    ],
)
def test_what_could_change_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(CinemeshError, match=message):
        prepared(text)


# -- planted faults ---------------------------------------------------------------------------------------------------


def drop_a_wait(program: Program) -> Program:
    at = next(i for i, op in enumerate(program.ops) if op.is_wait and op.to is Space.DEVICE)
    return program.with_ops([*program.ops[:at], *program.ops[at + 1 :]])


def fetch_the_neighbours(program: Program) -> Program:
    back = [i for i, op in enumerate(program.ops) if op.kind == "from_host"]
    ops = list(program.ops)
    ops[back[1]] = replace(ops[back[1]], inputs=ops[back[0]].inputs)
    return program.with_ops(ops)


def leave_before_it_is_made(program: Program) -> Program:
    at = next(i for i, op in enumerate(program.ops) if op.kind == "to_host")
    first = next(i for i, op in enumerate(program.ops) if op.place.phase is Phase.FORWARD)
    ops = list(program.ops)
    ops.insert(first, ops.pop(at))
    return program.with_ops(ops)


def compute_on_the_host(program: Program) -> Program:
    away = {op.inputs[0]: f"{op.inputs[0]}.host" for op in program.ops if op.kind == "to_host"}
    at = next(i for i, op in enumerate(program.ops) if op.kind == "swiglu_backward" and op.inputs[1].endswith("^"))
    ops = list(program.ops)
    inputs = tuple(away.get(name.removesuffix("^"), name) for name in ops[at].inputs)
    ops[at] = replace(ops[at], inputs=inputs)
    return program.with_ops(ops)


@pytest.mark.parametrize(
    ("fault", "checked"),
    [
        (drop_a_wait, "order"),
        (fetch_the_neighbours, "same"),
        (leave_before_it_is_made, "same"),
        (compute_on_the_host, "types"),
    ],
)
def test_a_planted_fault_is_found(fault: Callable[[Program], Program], checked: str) -> None:
    before = built("recompute=selective,offload=gate")
    program = prepare(before, backend="gloo", checked=True)
    assert checked in {finding.check for finding in check(fault(program), before)}
