"""Liveness on a program small enough to count by hand, and its laws on real ones."""

from __future__ import annotations

from typing import Any

import pytest

from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.layout import replicated
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Buffer, BufferKind, Op
from cinemesh.parallel.passes.liveness import lifetimes, persistent
from cinemesh.parallel.passes.pipeline import prepare


def by_hand() -> Program:
    """x (input, 4 floats) -> a -> b, of which a view of the first half is read last."""

    def buffer(name: str, n: int, kind: BufferKind = BufferKind.TEMPORARY, **view: Any) -> Buffer:
        return Buffer(name, (1, n), "float32", replicated(2), kind, **view)

    copy = {"signature": "xn->xn"}
    buffers = [
        buffer("x", 4, BufferKind.INPUT),
        buffer("a", 4),
        buffer("b", 4),
        buffer("half", 2, base="b", offset=2),
        buffer("y", 2, BufferKind.STATE),
    ]
    ops = [
        Op("first", "copy", ("x",), ("a",), copy),
        Op("second", "copy", ("a",), ("b",), copy),
        Op("third", "copy", ("half",), ("y",), copy),
    ]
    return Program(Plan(), {b.name: b for b in buffers}, ops, {"y": "y"})


def test_live_bytes_by_hand() -> None:
    program = by_hand()
    lives = lifetimes(program)
    assert persistent(program) == ["x", "y"]
    assert lives.persistent_bytes == 16 + 8
    assert lives.allocate == [["a"], ["b"], []]
    assert lives.free == [[], ["a"], ["b"]], "b lives until its view was read"
    assert lives.live_bytes == [24 + 16, 24 + 32, 24 + 16]
    assert lives.peak_bytes == 56 and lives.peak_op(program).name == "second"
    assert program.root("half") == ("b", 2)


def test_workspace_counts_at_its_own_record_only() -> None:
    work = {"first": 100, "second": 10, "third": 0}
    lives = lifetimes(by_hand(), workspace=lambda program, op: work[op.name])
    assert lives.peak_bytes == 56 and lives.workspace_bytes == [100, 10, 0]


@pytest.mark.parametrize(
    "text", ["tp=1", "tp=2,cp=2,dp_shard=2,micro_batches=2,prefetch=2", "cp=3,recompute=none", "dp_shard=2,dtype=bf16"]
)
def test_every_storage_is_allocated_and_freed_once(text: str) -> None:
    plan = Plan.parse(text)
    case = small_case(plan)
    program = prepare(build_step(case.config, plan, case.batch), backend="gloo")
    lives = lifetimes(program)
    allocated = [root for roots in lives.allocate for root in roots]
    freed = [root for roots in lives.free for root in roots]
    assert len(set(allocated)) == len(allocated) and sorted(allocated) == sorted(freed)
    assert not set(allocated) & set(persistent(program))
    left = sum(program.bytes(r) for r in allocated) - sum(program.bytes(r) for r in freed)
    assert left == 0
    assert min(lives.live_bytes) >= lives.persistent_bytes
    last = {program.root(name)[0]: i for i, op in enumerate(program.ops) for name in (*op.inputs, *op.outputs)}
    for i, roots in enumerate(lives.free):
        assert all(last[root] == i for root in roots)
