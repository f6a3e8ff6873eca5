"""What a program knows of its buffers, and hands on to others of the same records."""

from copy import deepcopy
from dataclasses import replace

import pytest

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Buffer, Op, altered

PLAN = Plan(tp=2, cp=2, dp_shard=2)


@pytest.fixture(scope="module")
def program() -> Program:
    return build_step(preset("tiny"), PLAN, BatchShape(2, (3, 4, 12)))


def known(program: Program) -> list[object]:
    """All that is kept, asked for twice: what is found the first time is what is kept."""
    p = program

    def found() -> list[object]:
        buffers = [(p.local_shape(name), p.bytes(name), p.root(name), p.span(name)) for name in p.buffers]
        return [buffers, [(p.storages(op), p.flops(op), p.bytes_moved(op)) for op in p.ops]]

    found()
    return found()


def test_an_altered_record_is_as_replace_makes_it(program: Program) -> None:
    buffer: Buffer = next(b for b in program.buffers.values() if b.base is not None)
    op: Op = next(op for op in program.ops if op.of is not None)
    assert altered(buffer) == buffer and altered(buffer) is not buffer
    assert altered(buffer, base=None, offset=7) == replace(buffer, base=None, offset=7) != buffer
    assert altered(op, kind="copy", of=None) == replace(op, kind="copy", of=None) != op


@pytest.mark.parametrize("other", [replace(PLAN, prefetch=1), replace(PLAN, tp=1), replace(PLAN, dp_shard=1)])
def test_a_program_under_another_plan_knows_what_a_fresh_one_finds(program: Program, other: Plan) -> None:
    """Local sizes of degrees that change are found anew, others are handed on."""
    before = known(program)
    under = program.under(other)
    fresh = Program(
        other, program.buffers, program.ops, program.outputs, program.inputs, program.states, program.blocks
    )
    assert under.plan == other and known(under) == known(fresh) and known(program) == before
    assert (known(under) == before) == (under.sizes == program.sizes)


def test_a_copy_of_a_program_finds_again_what_was_kept_by_identity(program: Program) -> None:
    """Records of a copy may lie where records of the original lay."""
    before = known(program)
    copied = deepcopy(program)
    first, *others = copied.ops
    copied._storages |= {id(op): program._storages[id(program.ops[0])] for op in others}  # pyright: ignore[reportPrivateUsage]
    assert known(copied) == before and first is not program.ops[0]


def test_a_resized_program_keeps_storages_alone(program: Program) -> None:
    before = known(program)
    name, buffer = next((n, b) for n, b in program.buffers.items() if b.base is None and len(b.shape) == 3)
    grown = altered(buffer, shape=(2 * buffer.shape[0], *buffer.shape[1:]))
    resized = program.resized(PLAN, {**program.buffers, name: grown}, program.ops)
    assert resized.bytes(name) == 2 * program.bytes(name)
    assert [resized.storages(op) for op in program.ops] == [program.storages(op) for op in program.ops]
    assert known(program) == before != known(resized)
