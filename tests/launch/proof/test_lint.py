"""The capture lint finds what would break a CUDA Graph: every check is shown to fail when its fault is planted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.kernels import reference
from cinemesh.kernels.reference import Kernel
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.lint import CHECKS, lint, lint_program, run
from cinemesh.launch.proof.lint_step import lint_step
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.layout import Axes
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.arena import Arena, place
from cinemesh.parallel.passes.liveness import Lifetimes
from cinemesh.parallel.passes.mark import mark
from cinemesh.parallel.runtime.alone import Alone
from cinemesh.parallel.runtime.comm import BoundCollective
from cinemesh.parallel.runtime.guard import Finding

ONE = Plan(dtype="float32", recompute="none")


@pytest.mark.parametrize(
    "text",
    [
        "tp=2,cp=2,dp_shard=2,dp_replicate=2,micro_batches=2,dtype=float32",
        "tp=4,cp=2,dp_shard=96",
        "tp=4,cp=2,dp_shard=96,fused_tp=true,recompute=full",
    ],
)
def test_our_own_steps_are_clean(text: str) -> None:
    """Also degrees that this machine could never run: the other ranks are stood for."""
    assert lint(Plan.parse(text), "tiny") == []


def test_the_real_model_is_checked_at_its_own_size() -> None:
    with pytest.raises(CinemeshError, match=r"heads\(48\) % tp\(5\)"):
        lint(Plan(tp=5), "movie-gen-30b")


# -- faults in a kernel -----------------------------------------------------------------------------------------------

steps = itertools.count(1)
kept: list[Tensor] = []
calls: Counter[int] = Counter()


def writes_its_input(inputs: reference.Tensors, outputs: reference.Tensors) -> None:
    inputs[0].mul_(1.0)


def writes_past_its_output(inputs: reference.Tensors, outputs: reference.Tensors) -> None:
    out = outputs[0]
    out.as_strided((out.numel() + 1,), (1,), out.storage_offset()).mul_(1.0)


def branches_on_a_counter(inputs: reference.Tensors, outputs: reference.Tensors) -> None:
    calls[outputs[0].data_ptr()] += 1
    if calls[outputs[0].data_ptr()] % 2:
        outputs[0].mul_(1.0)


KERNEL_FAULTS: dict[str, tuple[Callable[[reference.Tensors, reference.Tensors], object], str, str]] = {
    "reads a value": (lambda i, o: o[0].sum().item(), "synchronises", "reads a value back to the host"),
    "branches on data": (lambda i, o: bool((o[0] > 1e9).any()), "synchronises", "reads a value back to the host"),
    "shape of data": (lambda i, o: o[0].nonzero(), "synchronises", "shape that depends on data"),
    "generator": (lambda i, o: torch.randn(3), "synchronises", "draws from a generator's state"),
    "host tensor": (lambda i, o: o[0].add_(torch.tensor(0.0)), "synchronises", "makes a tensor from host values"),
    "large temporary": (lambda i, o: torch.empty(1 << 16), "allocates", "0 B are declared"),
    "keeps a tensor": (lambda i, o: kept.append(o[0] + 1), "allocates", "0 B are declared"),
    "writes its input": (writes_its_input, "writes", "outside of the record's outputs"),
    "writes past its output": (writes_past_its_output, "writes", "outside of the record's outputs"),
    "bakes in a counter": (lambda i, o: o[0].mul_(1 + 1e-9 * next(steps)), "baked in", "not the same call"),
    "bakes in an activation": (lambda i, o: o[0].mul_(float(i[0].numpy().flat[0])), "baked in", "not the same call"),
    "branches on a counter": (branches_on_a_counter, "baked in", "calls in one step"),
    "bakes in a table": (lambda i, o: o[0].mul_(torch.full((1,), 1e-3 * next(steps))), "baked in", "not the same"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "check", "what"), KERNEL_FAULTS.values(), ids=KERNEL_FAULTS)
def test_a_kernel_that_cannot_be_captured_is_named(
    fault: Callable[[reference.Tensors, reference.Tensors], object], check: str, what: str
) -> None:
    def silu(inputs: reference.Tensors, outputs: reference.Tensors) -> None:
        reference.silu(inputs, outputs)
        fault(inputs, outputs)

    kernels: dict[str, Kernel] = kernels_for("cpu") | {"silu": silu}
    found = [f for f in lint_step(small_case(ONE), kernels) if f.check == check]
    kept.clear()
    assert found and all("(silu)" in f.op for f in found), found
    assert any(what in f.what for f in found), found


@pytest.mark.parametrize(("kind", "given"), [("adamw", 8), ("draw_noise", 0)])
def test_what_the_step_is_given_is_other_in_its_second_run(kind: str, given: int) -> None:
    """A learning rate or sample id that the host reads: only another value of just that input shows it."""

    def bakes_in(inputs: reference.Tensors, outputs: reference.Tensors, **attributes: Any) -> None:
        getattr(reference, kind)(inputs, outputs, **attributes)
        outputs[0].add_(0.0, alpha=float(inputs[given].numpy().flat[0]))

    found = lint_step(small_case(ONE), kernels_for("cpu") | {kind: bakes_in})
    assert [f.check for f in found] == ["baked in"] and kind in found[0].op, found


# -- faults in the order of collectives -------------------------------------------------------------------------------


class Swapping(Alone):
    """Two gathers of units of different size have changed places."""

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        collective = super().bind(kind, axes, source, output, staging)

        def issue() -> None:
            collective.issue()
            if len(self.ledger) == 6:
                self.ledger[1], self.ledger[2] = self.ledger[2], self.ledger[1]

        return BoundCollective(issue, collective.wait)


class Repeating(Alone):
    """Sends the third collective twice."""

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        collective = super().bind(kind, axes, source, output, staging)

        def issue() -> None:
            collective.issue()
            if len(self.ledger) == 3:
                collective.issue()

        return BoundCollective(issue, collective.wait)


@pytest.mark.parametrize("fault", [Swapping, Repeating])
def test_collectives_in_another_order_are_found(fault: type[Alone]) -> None:
    case = small_case(Plan.parse("dp_shard=2", dtype="float32"))
    found = lint_step(case, comm=fault(case.plan))
    assert [f.check for f in found] == ["order"] and "lane" in found[0].what


def built(text: str) -> Program:
    case = small_case(Plan.parse(text, dtype="float32"))
    return build_step(case.config, case.plan, case.batch)


# -- faults in the passes ---------------------------------------------------------------------------------------------


def test_a_pass_that_breaks_the_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that a pass loses, and a value that it makes of others."""

    def losing(program: Program) -> Program:
        waits = [i for i, op in enumerate(program.ops) if op.is_wait]
        return program.with_ops([op for i, op in enumerate(program.ops) if i != waits[3]])

    def swapping(program: Program) -> Program:
        at = next(i for i, op in enumerate(program.ops) if op.kind == "swiglu")
        swapped = replace(program.ops[at], inputs=program.ops[at].inputs[::-1])
        return program.with_ops([*program.ops[:at], swapped, *program.ops[at + 1 :]])

    assert lint_program(built("tp=2")) == []
    for fault, check in ((losing, "order"), (swapping, "same")):
        monkeypatch.setattr("cinemesh.parallel.passes.pipeline.fuse", fault)
        assert check in {f.check for f in lint_program(built("tp=2"))}


def test_a_mark_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are linted as they are captured, whatever the plan."""

    def losing(program: Program) -> Program:
        program = mark(program)
        marks = [i for i, op in enumerate(program.ops) if op.kind == "mark"]
        return program.with_ops([op for i, op in enumerate(program.ops) if i != marks[3]])

    monkeypatch.setattr("cinemesh.parallel.passes.pipeline.mark", losing)
    found = lint_program(built("tp=2"))
    assert {f.check for f in found} == {"marks"} and any("no mark stands before it" in f.what for f in found)


def test_a_mark_that_would_not_be_captured_is_found() -> None:
    def reads_back(inputs: reference.Tensors, outputs: reference.Tensors) -> None:
        outputs[0].fill_(inputs[0].item())

    found = lint_step(small_case(ONE), kernels_for("cpu") | {"mark": reads_back})
    assert {f.check for f in found} == {"synchronises"} and all("(mark)" in f.op for f in found)


def test_storages_that_share_bytes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(program: Program, lives: Lifetimes) -> Arena:
        arena = place(program, lives)
        if not arena.offsets:  # of the host
            return arena
        issues = [op for op in program.ops if op.is_issue]
        roots = [program.root(op.outputs[0])[0] for op in issues[:2]]
        return replace(arena, offsets={**arena.offsets, roots[1]: arena.offsets[roots[0]]})

    monkeypatch.setattr("cinemesh.launch.proof.lint.place", careless)
    found = lint_program(built("cp=2"))
    assert {f.check for f in found} == {"arena"} and any("overlaps" in f.what for f in found)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_lists_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(plan="tp=2,dtype=float32", model="tiny", as_json=False) == 0
    said = capsys.readouterr().out
    assert all(check in said for check in CHECKS) and "NO" not in said


def test_a_finding_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    finding = Finding("allocates", "mb0/blocks.0.forward/h1 (modulate_norm)", "8 B")
    monkeypatch.setattr("cinemesh.launch.proof.lint.lint", lambda plan, model, begin: [finding])
    assert run(plan="tp=2", model="tiny", as_json=True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and answer["findings"] == [
        {"check": "allocates", "op": "mb0/blocks.0.forward/h1 (modulate_norm)", "what": "8 B"}
    ]
    assert run(plan="tp=2", model="tiny", as_json=False) == 1
    assert "mb0/blocks.0.forward/h1 (modulate_norm): 8 B" in capsys.readouterr().out
