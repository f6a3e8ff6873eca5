"""``cinemesh lint``: prove without a GPU that a plan's step can be captured into a CUDA Graph and replayed.

From the program: behind every pass it is still the one that was built and typed, every collective is waited for once,
no two live storages share a byte of the arena. From the step, run on this process alone on a small model with the
plan's own degrees, under a dispatch mode: no host read, no allocation above what an op declares, no write outside its
outputs, no collective that the program does not have. From two frozen steps with other samples, learning rate and step
number: call for call the same, so nothing that changes between steps is baked in. docs/cuda_graphs.md says which
pitfall each check guards against.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor

from ...kernels.ops import OPS
from ...kernels.reference import Kernel
from ...model.config import USUAL_LATENTS, preset
from ...model.inputs import BatchShape
from ...model.runner import StepRunner
from ...model.step import build_step
from ...model.weights import probe_values
from ...parallel.ir.check import Finding, check, disjoint
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.communicators import communicator_name
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import lane_name
from ...parallel.passes.arena import place
from ...parallel.passes.liveness import lifetimes
from ...parallel.passes.pipeline import passes
from ...parallel.runtime.comm import BoundCollective, Communicator
from ...parallel.runtime.frozen import Frozen
from ...parallel.runtime.guard import Guard
from ...parallel.runtime.ledger import Entry, difference, expected
from ...parallel.runtime.tape import same
from ..plans import read_plan
from .parity import OPTIMIZER, Case, load_batch
from .verify import small_case

CHECKS = {
    "same": "behind every pass all records are there and read the values that they were built on",
    "types": "behind every pass each value is placed as its record and its inputs say",
    "arena": "temporaries lie in the arena, and no two that live together overlap",
    "order": "collectives run in the program's order, each is waited for once, and there are no others",
    "synchronises": "nothing reads back to the host, depends on data in shape, or draws from a generator",
    "allocates": "no op allocates more than the workspace that it declares",
    "writes": "no op writes outside of its outputs",
    "baked in": "two frozen steps make the same calls: nothing that changes between steps is in them",
}

FUSED_NOTE = (
    "  fused_tp: checked as its collectives and products; what torch's symmetric memory makes of them, a GPU must show"
)


class Alone(Communicator):
    """Stands for all other ranks: shapes and order are theirs, values are this rank's own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ledger: list[Entry] = []
        self.record = True

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        payload = max(source.numel(), output.numel()) * source.element_size()
        entry = Entry(kind, lane_name(axes), communicator_name(axes, kind), payload)
        ranks = self.plan.size(axes)

        def issue() -> None:
            self.ledger.append(entry)
            if kind == "all_gather":
                output.view(ranks, -1).copy_(source.view(1, -1).expand(ranks, -1))
            elif kind == "reduce_scatter":
                output.view(-1).copy_(source.view(ranks, -1)[0])

        return BoundCollective(issue, lambda: None)


def lint_program(built: Program) -> list[Finding]:
    """What the program alone shows, at any size: behind every pass, and where its storages lie in the end."""
    found: list[Finding] = []
    program = built
    for run in passes(built.plan, backend="nccl"):
        program = run(program)
        found += (one for one in check(program, built) if one not in found)
    arena = place(program)
    return found + disjoint(program, arena.offsets, arena.total_bytes)


def lint_step(case: Case, kernels: dict[str, Kernel] | None = None, comm: Alone | None = None) -> list[Finding]:
    """What a step shows when it runs. Doors for tests: ``kernels`` and ``comm`` with a fault in them."""
    comm = comm or Alone(case.plan)
    options = {"seed": case.seed, "kernels": kernels, "comm": comm}
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, **options)
    runner.initialise(probe_values(case.seed))
    return _guarded(case, runner, comm) + _two_frozen_steps(case, runner)


def _guarded(case: Case, runner: StepRunner, comm: Alone) -> list[Finding]:
    load_batch(case, runner, 0)
    runner.buffers["lr"].fill_(1e-2)
    found: list[Finding] = []
    with torch.no_grad():
        for record, workspace in zip(runner.executor.records, lifetimes(runner.program).workspace_bytes, strict=True):
            with Guard(record, workspace) as guard:
                record.run()
            if record.op.kind in OPS or record.op.kind in FUSED:
                found += guard.findings
    if (wrong := difference(comm.ledger, expected(runner.program))) is not None:
        found.append(Finding("order", "the step", wrong))
    return found


def _two_frozen_steps(case: Case, runner: StepRunner) -> list[Finding]:
    """Other samples, learning rate and step number: the calls may not know."""
    taken: list[Frozen] = []
    for step in (1, 2):
        load_batch(case, runner, step)
        runner.buffers["lr"].fill_(1e-2 / step)
        taken.append(Frozen(runner.executor))
        taken[-1].record()
    found: list[Finding] = []
    for part, first, second in zip(taken[0].parts, taken[0].segments, taken[1].segments, strict=True):
        if first is None or second is None:
            continue
        name = f"{part.op.name} ({part.op.kind})"
        if len(first.calls) != len(second.calls):
            found.append(
                Finding("baked in", name, f"{len(first.calls)} calls in one step, {len(second.calls)} in the next")
            )
            continue
        for a, b in zip(first.calls, second.calls, strict=True):
            if not same(a, b):
                found.append(Finding("baked in", name, f"{a.op} is not the same call in the next step"))
    return found


def lint(plan: Plan, model: str) -> list[Finding]:
    """All checks: the program at the model's own size and latent, the step shrunk to run here.

    Raises CinemeshError when the plan does not divide the model; ``tiny`` is grown until it does.
    """
    case = small_case(plan, model, max_procs=plan.world_size)
    config, batch = case.config, case.batch
    if model != "tiny":
        config, batch = preset(model), BatchShape(1, USUAL_LATENTS[model])
    found = lint_program(build_step(config, plan, batch))
    return found + [f for f in lint_step(case) if f not in found]


def run(*, plan: str, model: str, as_json: bool) -> int:
    """Print every check and its findings; the exit code: 0, or 1 when there is a finding."""
    chosen = read_plan(plan)
    found = lint(chosen, model)
    if as_json:
        print(json.dumps({"ok": not found, "plan": chosen.to_dict(), "findings": [asdict(f) for f in found]}, indent=2))
    else:
        _show(chosen, found)
    return 1 if found else 0


def _show(plan: Plan, found: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    console.print(f"plan {plan.equation()}: may a step be captured?")
    if plan.fused_tp:
        console.print(FUSED_NOTE, soft_wrap=True)
    for name, says in CHECKS.items():
        mine = [f for f in found if f.check == name]
        console.print(f"  {'[bold red]NO[/]' if mine else '[green]ok[/]'}  {name:<13} {says}", soft_wrap=True)
        for finding in mine:
            console.print(f"        {finding}", style="red", soft_wrap=True)
