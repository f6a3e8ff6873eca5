"""Rematerialize clones what backward needs, all of it, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Op, Phase, Place, Slice, SliceOf
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.recompute import KEPT, rematerialize

BLOCK = Place(Phase.BACKWARD, micro_batch=0, block=0, unit="blocks.0")


def built(
    recompute: str | tuple[str, ...], tp: int = 1, cp: int = 1, dp_shard: int = 1, micro_batches: int = 1
) -> Program:
    plan = Plan(tp, cp, dp_shard, micro_batches=micro_batches, recompute=recompute, dtype="float32")
    case = small_case(plan)
    return build_step(case.config, case.plan, case.batch)


def clones(program: Program, backward: Place | None = None) -> list[Op]:
    """Cloned compute records and issues of collectives; all of them, or those made again for one block's backward."""
    ops = program.ops
    if backward is not None:
        first = next(i for i, op in enumerate(ops) if op.place == backward)
        start = max(i for i, op in enumerate(ops[:first]) if not op.clone) + 1
        last = max(i for i, op in enumerate(ops) if op.place == backward)
        ops = ops[start:last]
    return [op for op in ops if op.clone and not op.is_wait]


def roles(ops: list[Op]) -> set[str]:
    return {op.label for op in ops}


NORMS_AND_GATHERS = {"modulation", "h1", "h1_gathered", "h2", "h2_gathered", "act", "kv_gathered", "x1_gathered"}
STREAM = {"x0", "x1", "x2"}  # sums of the block's input and the branches


def test_selective_redoes_norms_sums_the_product_and_gathers() -> None:
    """Every matmul and attention is kept: what is redone is token-local or a gather."""
    again = clones(rematerialize(built("selective", tp=2, cp=2, dp_shard=2)), BLOCK)
    assert roles(again) == NORMS_AND_GATHERS | STREAM | {"flat"}
    assert "matmul" not in {op.kind for op in again}


def test_full_redoes_the_block_but_for_its_output() -> None:
    program = rematerialize(built("full", tp=2, cp=2, dp_shard=2))
    forward = replace(BLOCK, phase=Phase.FORWARD)
    wanted = roles([op for op in program.ops if op.place == forward and not op.clone and not op.is_wait])
    # Nothing of backward reads the block's output; all else does.
    assert roles(clones(program, BLOCK)) == wanted - {"x"} | {"flat"}


def test_none_adds_only_unit_gathers() -> None:
    program = rematerialize(built("none", tp=2, cp=2, dp_shard=2))
    assert Counter(op.name for op in clones(program)) == {
        "mb0/blocks.0.weights/flat~": 1,  # the last block's weights stay from forward
        "mb0/conditioning.weights/flat~": 1,
    }


def test_an_explicit_list_is_kept() -> None:
    kept = ("q", "kv", "o", "lse", "h1_gathered", "rstd1")
    again = roles(clones(rematerialize(built(kept, tp=2, cp=2)), BLOCK))
    assert not again & set(kept)
    assert {"gate", "up", "cross_q", "y1", "kv_gathered"} <= again
    assert "h1" not in again, "its record makes rstd1 too, which backward reads: both are kept, so it need not run"


def test_selective_is_its_list() -> None:
    named, listed = (rematerialize(built(r, tp=2)) for r in ("selective", KEPT["selective"]))
    assert [(op.name, op.inputs) for op in named.ops] == [(op.name, op.inputs) for op in listed.ops]


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(CinemeshError, match=re.escape("plan: recompute keeps ['queries'], which no block has;")):
        rematerialize(built(("q", "queries")))


@pytest.mark.parametrize("recompute", ["none", "selective", "full", ("q", "gate")])
def test_clones_are_exactly_what_is_needed(recompute: str | tuple[str, ...]) -> None:
    """Every clone is read, by backward or another clone, and no name is written twice.

    That nothing is read before it is written: test_aliasing.py.
    """
    program = rematerialize(built(recompute, tp=2, cp=2, dp_shard=2, micro_batches=2))
    read = {ancestor for op in program.ops for name in op.inputs for ancestor in family(program, name)}
    written: set[str] = set()
    issued: set[str] = set()
    for op in program.ops:
        assert not written & set(op.outputs), f"{op.name} writes again"
        written.update(op.outputs)
        if op.is_wait:
            assert op.waits_for in issued
        issued.add(op.name)
        if op.clone:
            assert op.place.phase in (Phase.FORWARD, Phase.WEIGHTS)
            assert any(name in read for name in op.outputs), f"nobody reads {op.name}"


def family(program: Program, name: str) -> list[str]:
    """The buffer and what it is a view or another name of."""
    found = [name]
    while (base := program.buffers[found[-1]].base) is not None:
        found.append(base)
    return found


def test_the_block_between_forward_and_backward_keeps_no_more_than_was_asked() -> None:
    """What is live when backward starts, for a two-layer step: less with every choice that keeps less."""
    live = {}
    for recompute in ("none", "selective", "full"):
        program = rematerialize(built(recompute, tp=2))
        turn = next(i for i, op in enumerate(program.ops) if op.kind == "velocity_loss_backward")
        live[recompute] = lifetimes(program).live_bytes[turn]
    assert live["full"] < live["selective"] < live["none"]


def test_backward_of_a_block_reads_nothing_of_forward_but_what_is_kept() -> None:
    before = built("full", tp=2)
    of_forward = {b.name for b in before.buffers.values() if b.place == replace(BLOCK, phase=Phase.FORWARD)}
    for op in rematerialize(before).ops:
        if op.place == BLOCK:
            assert not of_forward.intersection(op.inputs), op.name


# -- blocks that differ, and slices -----------------------------------------------------------------------------------


def test_the_last_blocks_follow_their_own_choice() -> None:
    """Two of four blocks: each block's clones are those of a plan that says the same for all."""
    plan = Plan(2, 2, dtype="float32", recompute="full", recompute_last=("q", "o", "lse", "x0"), last_blocks=2)
    case = small_case(plan)
    config = replace(case.config, layers=4)

    def made_again(plan: Plan) -> list[set[str]]:
        program = rematerialize(build_step(config, plan, case.batch))
        again = [op for op in clones(program) if op.place.phase is Phase.FORWARD]
        return [roles([op for op in again if op.place.block == layer]) for layer in range(4)]

    mixed = made_again(plan)
    first, last = (
        made_again(replace(plan, recompute=r, recompute_last=None, last_blocks=0))
        for r in (plan.recompute, plan.recompute_last)
    )
    assert mixed == [first[0], first[1], last[2], last[3]]
    assert first[0] != last[0]
    assert made_again(replace(plan, last_blocks=4)) == last, "all of them, and no more"


SLICED = Plan(2, 2, kv_slices=3, tp_slices=3, dtype="float32")


def test_slices_are_made_again_or_kept_together() -> None:
    case = small_case(SLICED)
    for recompute, again in (("selective", {"h1_gathered", "kv_gathered"}), (("q", "kv_gathered", "lse"), {"o", "y1"})):
        plan = replace(SLICED, recompute=recompute)
        made = clones(rematerialize(build_step(case.config, plan, case.batch)), BLOCK)
        for role in again:
            of = SliceOf.HEADS if role in ("o", "kv_gathered") else SliceOf.TOKENS
            assert {Slice(of, i) for i in range(3)} <= {op.slice for op in made if op.role == role}, role
        kept = KEPT[recompute] if isinstance(recompute, str) else recompute
        assert {op.role for op in made} & set(kept) <= {"lse"}, "lse comes with o"


def test_what_reads_the_whole_reads_all_slices_made_again() -> None:
    """The weight gradient reads the gathered input whole: the clone of the storage, of which every slice is written."""
    case = small_case(SLICED)
    program = rematerialize(build_step(case.config, SLICED, case.batch))
    reader = next(op for op in program.ops if op.place == BLOCK and op.role == "dkv_weight")
    whole = reader.inputs[0]
    assert whole == "mb0/blocks.0.forward/h1_gathered~"
    before = program.ops[: program.ops.index(reader)]
    waits = [op for op in before if op.is_wait and program.root(op.outputs[0])[0] == whole]
    assert sum(program.local_elements(op.outputs[0]) for op in waits) == program.local_elements(whole)
