"""Every column of the op table against what is counted from outside; half and double of any are found.

The plain form of an op's example runs under ``counting.Counter`` with the dtypes of policy bf16, at sizes that nothing
divides; ops that walk chunks of their own span more than two. Workspace is that of what a CPU runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cinemesh.kernels.counts import Operands
from cinemesh.kernels.op_spec import OpSpec
from cinemesh.kernels.ops import OPS, signature_of
from cinemesh.kernels.reference import REFERENCE
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.parity import OPTIMIZER
from cinemesh.model.config import preset
from cinemesh.model.forward import build_unpatchify
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare

from .counting import Counter, allocated, operands_of
from .examples import EXAMPLES, Example

SHAPE = (37, 5, 41)
CHOSEN = kernels_for("cpu")
DTYPES = {"c": torch.bfloat16, "s": torch.float32, "i": torch.int64, "b": torch.bool}
COLUMNS = ("flops", "bytes", "kernels", "plain_bytes", "workspace")
LOOSE = 1.25  # workspace is an upper bound: what allocates it depends on the policy


@dataclass(frozen=True)
class Counted:
    """One example: what its row counts by, and what was counted."""

    operands: Operands
    flops: int
    bytes: int
    kernels: int
    plain_bytes: int
    workspace: int


def call(kind: str, example: Example) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Inputs, outputs and attributes as an executor would pass them under policy bf16."""
    inputs, outputs = (
        [x.to(DTYPES[dtype]).clone(memory_format=torch.contiguous_format) for x, dtype in zip(xs, dtypes, strict=True)]
        for xs, dtypes in zip((example.inputs, example.wanted), example.dtypes.split("->"), strict=True)
    )
    for output, source in OPS[kind].in_place.items():
        outputs[output] = inputs[source]
    if example.add:
        inputs.append(outputs[0])
    return inputs, outputs, {**example.attrs, **({"add": True} if example.add else {})}


@cache
def counts(kind: str) -> tuple[Counted, ...]:
    """Of every example of an op."""
    torch.manual_seed(3)
    found: list[Counted] = []
    for example in EXAMPLES[kind](*SHAPE):
        if not example.counted:
            continue
        inputs, outputs, attrs = call(kind, example)
        with Counter([*inputs, *outputs]) as counter:
            REFERENCE[kind](inputs, outputs, **attrs)
        flops = counter.products if OPS[kind].is_product else counter.flops
        moved = counter.touched_bytes, counter.kernels, counter.moved_bytes
        operands = operands_of(kind, inputs, outputs, attrs)
        found.append(Counted(operands, flops, *moved, allocated(CHOSEN[kind], *call(kind, example))))
    return tuple(found)


def faults(kind: str, spec: OpSpec) -> Iterator[str]:
    for found in counts(kind):
        o = found.operands
        said = spec.flops_of(o), spec.bytes_of(o), spec.kernels(o), spec.plain_bytes_of(o), spec.workspace(o)
        for column, declared in zip(COLUMNS, said, strict=True):
            counted = getattr(found, column)
            if column == "workspace" and counted <= declared <= LOOSE * counted:
                continue
            if declared != counted:
                yield f"{column}: {declared:,} in the table, {counted:,} counted, {o.sizes} {'added' if o.adds else ''}"


@pytest.mark.parametrize("kind", OPS)
def test_every_column_is_what_is_counted(kind: str) -> None:
    assert counts(kind)
    assert not list(faults(kind, OPS[kind]))


def planted(spec: OpSpec, column: str, factor: float) -> OpSpec:
    """The row with one column wrong."""
    right = getattr(spec, column) or {"bytes": spec.bytes_of, "plain_bytes": spec.plain_bytes_of}[column]
    return replace(spec, **{column: lambda o: int(factor * right(o))})


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", OPS)
def test_a_factor_of_two_in_any_column_is_found(kind: str, column: str) -> None:
    spec = OPS[kind]
    right = getattr(spec, column)
    if right is not None and not any(right(found.operands) for found in counts(kind)):
        return  # twice nothing is nothing
    for factor in (0.5, 2):
        assert any(fault.startswith(f"{column}:") for fault in faults(kind, planted(spec, column, factor))), factor


def test_most_columns_are_planted_in() -> None:
    nothing = {c: [k for k in OPS if not any(getattr(f, c) for f in counts(k))] for c in COLUMNS}
    assert nothing["bytes"] == nothing["kernels"] == nothing["plain_bytes"] == []
    assert set(nothing["flops"]) == {"unpatchify", "drop_mask", "cast", "copy", "zero_gaps", "patchify", "mark"}
    assert len(nothing["workspace"]) < len(OPS) // 2


# -- what is said in words, not numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPS)
def test_products_are_told_from_the_rest(kind: str) -> None:
    inputs, outputs, attrs = call(kind, next(EXAMPLES[kind](*SHAPE)))
    with Counter([*inputs, *outputs]) as counter:
        REFERENCE[kind](inputs, outputs, **attrs)
    assert OPS[kind].is_product == (counter.products > 0)
    assert OPS[kind].backward == kind.endswith("_backward")


def some_tokens(xs: list[Tensor], labels: tuple[str, ...], first: int, last: int) -> list[Tensor]:
    """Those of each tensor that has tokens."""
    return [
        x.narrow(names.index("t"), first, last - first).contiguous() if "t" in names else x
        for x, names in zip(xs, labels, strict=True)
    ]


@pytest.mark.parametrize("kind", [kind for kind, spec in OPS.items() if spec.token_local])
def test_a_token_of_a_token_local_op_needs_no_other(kind: str) -> None:
    """Its outputs for some tokens are those of the op on these tokens alone: so a slice may run ahead of the others."""
    torch.manual_seed(5)
    signature = signature_of(kind, {})
    for example in EXAMPLES[kind](*SHAPE):
        for tokens in ((0, 11), (11, SHAPE[0])):
            wanted = some_tokens(example.wanted, signature.outputs, *tokens)
            inputs = some_tokens(example.inputs, signature.inputs, *tokens)
            outputs = [torch.zeros_like(x) for x in wanted]
            attrs = {**example.attrs, **({"add": True} if example.add else {})}
            REFERENCE[kind]([*inputs, *outputs[: example.add]], outputs, **attrs)
            for got, want in zip(outputs, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


# -- examples have the dtypes of a step -------------------------------------------------------------------------------

PLANS = ("micro_batches=2", "tp=2,cp=2,dp_shard=2", "cp=2,kv_chunks=2")


def dtypes_in_a_step() -> dict[str, set[str]]:
    """Of every op in steps of policy bf16 and in the sampler, as examples write them; an added input apart."""
    letters = {"bfloat16": "c", "float32": "s", "int64": "i", "bool": "b"}
    config, batch = preset("tiny"), BatchShape(2, (6, 4, 12))
    plans = [Plan.parse(text, dtype="bf16") for text in PLANS]
    programs = [prepare(build_step(config, plan, batch, OPTIMIZER), backend="nccl") for plan in plans]
    programs.append(build_unpatchify(config, plans[0], batch))
    found: dict[str, set[str]] = {}
    for program in programs:
        for op in (part for record in program.ops for part in record.parts if part.kind in OPS):
            shown = program.operands(op)
            inputs = shown.inputs[:-1] if shown.adds else shown.inputs
            sides = ("".join(letters[x.dtype] for x in xs) for xs in (inputs, shown.outputs))
            found.setdefault(op.kind, set()).add("->".join(sides))
    return found


def test_examples_have_the_dtypes_of_a_step() -> None:
    """Of merges as many parts as the plan has; of the other ops every combination that is counted."""
    for kind, of_steps in dtypes_in_a_step().items():
        written = {example.dtypes for example in EXAMPLES[kind](*SHAPE)}
        assert written & of_steps, kind
        if kind not in ("merge_attention", "sum_parts"):
            assert written <= of_steps, kind
