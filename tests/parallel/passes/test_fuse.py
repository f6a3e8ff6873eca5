"""The pass that takes the position add into the norm behind it, and what the fused ops of a block save."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.reference import REFERENCE
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import Optimizer, build_step
from cinemesh.parallel.ir.builder import Builder
from cinemesh.parallel.ir.layout import BATCH, NONE, TOKENS, Placement
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Phase
from cinemesh.parallel.passes.fuse import fuse
from cinemesh.parallel.passes.recompute import rematerialize
from cinemesh.parallel.runtime.executor import Executor

T, B, D = 6, 2, 8
STREAM = Placement((TOKENS, BATCH, NONE))


def small(between: str = "") -> Program:
    """x + position, its norm, and a residual that reads the sum again; ``between``: what stands in the way."""
    b = Builder(Plan(dtype="float64"))

    x = b.input("x", (T, B, D), "float64", STREAM)
    position = b.input("position", (T, D), "float64", Placement((TOKENS, NONE)))
    gain = b.input("gain", (D,), "float64", Placement((NONE,)))
    scale, shift = (b.input(name, (B, D), "float64", Placement((BATCH, NONE))) for name in ("scale", "shift"))
    (x0,) = b.op("add_position", [x, position], "x0")
    outputs = {}
    if between == "a reader":
        outputs["y"] = (b.op("residual", [x0, x0], "y")[0], STREAM)
    if between == "a writer":
        outputs["x"] = (b.op("add", [x0], "x_added", add_to=x)[0], STREAM)
    h, _ = b.op("modulate_norm", [x0, gain, scale, shift], ("h", "rstd"), eps=1e-5)
    outputs["out"] = (b.op("residual", [x0, h], "out")[0], STREAM)
    return b.finish(outputs)


def run(program: Program) -> list[torch.Tensor]:
    executor = Executor(program, dict.fromkeys(("tp", "cp", "dp_shard", "dp_replicate"), 0), None, kernels=REFERENCE)
    torch.manual_seed(3)
    for given in program.inputs:
        executor.load(given.buffer, torch.randn(program.local_shape(given.buffer), dtype=torch.float64))
    found: list[torch.Tensor] = []
    last = len(program.ops) - 1

    def watch(i: int) -> None:
        if i == last:
            found.extend(executor.tensor(name).clone() for name in program.outputs.values())

    executor.run(watch)
    return found


def test_the_fused_program_computes_the_same_bits() -> None:
    program = small()
    fused = fuse(program)
    assert [op.kind for op in fused.ops] == ["position_modulate_norm", "residual"]
    assert fused.ops[0].outputs == ("x0", "h", "rstd") and fused.ops[0].attrs == {"eps": 1e-5}
    for one, other in zip(run(program), run(fused), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("between", ("a reader", "a writer"))
def test_what_stands_between_keeps_them_apart(between: str) -> None:
    """The sum, or what it is made of, would be read too late."""
    program = small(between)
    assert [op.kind for op in fuse(program).ops] == [op.kind for op in program.ops]


def block_30b(plan: Plan) -> Program:
    """Two blocks of the 30B model with all else that a step has."""
    config = replace(preset("movie-gen-30b"), layers=2)
    optimizer = Optimizer((0.9, 0.95), 1e-8, 0.1, 1.0, 0.9999)
    return rematerialize(build_step(config, plan, BatchShape(1, USUAL_LATENTS["movie-gen-30b"]), optimizer))


@pytest.mark.parametrize("recompute", ("none", "selective", "full"))
@pytest.mark.parametrize("degrees", ("tp=1", "tp=8,cp=2"))
def test_the_ops_of_a_block_move_at_most_30_percent_of_their_plain_forms(degrees: str, recompute: str) -> None:
    """Those that are neither products nor attention, in bf16, each as one kernel that moves no more than it must."""
    program = block_30b(Plan.parse(degrees, dtype="bf16", recompute=recompute))
    fused = fuse(program)

    def block(program: Program) -> list[int]:
        phases = (Phase.FORWARD, Phase.BACKWARD)
        rows = (op for op in program.ops if op.place.block == 0 and op.place.phase in phases)
        mine = [(OPS[op.kind], program.operands(op)) for op in rows if op.kind in OPS and not OPS[op.kind].is_product]
        return [sum(spec.bytes_of(o) for spec, o in mine), sum(spec.plain_bytes_of(o) for spec, o in mine)]

    (one_each, plain), (moved, same) = block(program), block(fused)
    print(
        f"{degrees} {recompute}: {moved / plain:.3f} of {plain / 1e9:.2f} GB; "
        f"without the position {one_each / plain:.3f}"
    )
    assert same == plain, "fusing changes what plain forms move"
    assert moved <= 0.30 * plain
    assert moved < one_each
