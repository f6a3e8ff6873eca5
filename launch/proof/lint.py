"""``cinemesh lint``: prove without a GPU that a plan's step can be captured into a CUDA Graph and replayed.

From the program: behind every pass it is still the one that was built and typed, every collective is waited for once,
no two live storages share a byte of the arena. From the step, on a small model with the plan's own degrees: what
``lint_step.py`` sees when it runs. docs/cuda_graphs.md says which pitfall each check guards against.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.ir.check import Finding, check, disjoint
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Space
from ...parallel.passes.arena import place
from ...parallel.passes.liveness import lifetimes
from ...parallel.passes.pipeline import passes
from ..models import read_model
from ..plans import read_plan
from ..progress import Begin, each, progress
from ..tables import new_console, plain_table
from .lint_step import lint_step
from .verify import small_case

CHECKS = {
    "same": "behind every pass all records are there and read the values that they were built on",
    "types": "behind every pass each value is placed as its record and its inputs say",
    "marks": "the records that tell a watchdog where a step stands are all there, each in its place",
    "arena": "temporaries lie in the arena of their space, and no two that live together overlap",
    "order": "collectives and host copies run in the program's order, each is waited for once, and there are no others",
    "synchronises": "nothing reads back to the host, depends on data in shape, or draws from a generator",
    "allocates": "no op allocates more than the workspace that it declares",
    "writes": "no op writes outside of its outputs",
    "baked in": "two frozen steps make the same calls: nothing that changes between steps is in them",
}

FUSED_NOTE = (
    "  fused_tp: checked as its collectives and products; what torch's symmetric memory makes of them, a GPU must show"
)


def lint_program(built: Program, begin: Begin = lambda _: None) -> list[Finding]:
    """What the program alone shows, at any size: behind every pass, and where its storages lie in the end."""
    found: list[Finding] = []
    program = built
    for run in each(passes(built.plan, backend="nccl", marked=True), begin, lambda run: f"behind {run.__name__}"):
        program = run(program)
        found += (one for one in check(program, built) if one not in found)
    begin("the arena")
    for space in Space:
        arena = place(program, lifetimes(program, space))
        found += disjoint(program, arena.offsets, arena.total_bytes, space)
    return found


def lint(plan: Plan, model: str, begin: Begin = lambda _: None) -> list[Finding]:
    """All checks: the program at the model's own size and latent, the step shrunk to run here.

    ``begin`` is told of each of ``lint_parts(plan)``. Raises CinemeshError when the plan does not divide the model;
    ``tiny`` is grown until it does.
    """
    begin("building the program")
    case = small_case(plan, model, max_procs=plan.world_size)
    if model == "tiny":
        built = build_step(case.config, case.plan, case.batch)
    else:
        named = read_model(model)
        built = build_step(named.config, plan, BatchShape(1, named.latent()))
    found = lint_program(built, begin)
    begin("a small step, as it runs")
    return found + [f for f in lint_step(case) if f not in found]


def lint_parts(plan: Plan) -> int:
    """How often ``lint`` says what it begins."""
    return len([*passes(plan, backend="nccl", marked=True)]) + 3


def run(*, plan: str, model: str, as_json: bool) -> int:
    """Print every check and its findings; the exit code: 0, or 1 when there is a finding."""
    chosen = read_plan(plan)
    with progress("linting", lint_parts(chosen), silent=as_json) as begin:
        found = lint(chosen, model, begin)
    if as_json:
        print(json.dumps({"ok": not found, "plan": chosen.to_dict(), "findings": [asdict(f) for f in found]}, indent=2))
    else:
        _show(chosen, found)
    return 1 if found else 0


def _show(plan: Plan, found: Sequence[Finding]) -> None:
    console = new_console()
    console.print(f"plan {plan.equation()}: may a step be captured?")
    if plan.fused_tp:
        console.print(FUSED_NOTE)
    table = plain_table("", "check", "says", header=False)
    for name, says in CHECKS.items():
        mine = [f for f in found if f.check == name]
        table.add_row("NO" if mine else "ok", name, says, style="bold red" if mine else "")
        for finding in mine:
            table.add_row("", "", str(finding), style="red")
    console.print(table)
