"""``cinemesh compare``: plans side by side by their whole steps, and what each difference costs (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.console import Console

from ...errors import CinemeshError
from ...parallel.ir.fields import AXES
from ...parallel.ir.plan import Plan
from ...perf_model.prices.played import PlayedStep
from ...perf_model.report.explain import describe, error_bar_of
from ...perf_model.report.software import kernels_of
from ...perf_model.search.evaluator import Evaluator
from ...perf_model.search.request import Request
from ..options import Asked
from ..progress import Begin, progress
from ..tables import new_console, plain_table
from . import reply
from .asked import plans_asked, print_taken
from .explain import asked_of, heading, played_plan
from .reply import Against, CompareReply, Difference, Schema
from .software import print_kernels

LEAST = 5e-4  # of the cost of a sample: a smaller difference is shown as none
# Fields that mean something only together; every other field of a plan is a difference of its own.
TOGETHER = {"degrees": AXES, "recompute": ("recompute", "recompute_last", "last_blocks", "offload")}


@dataclass(frozen=True)
class Beside:
    """A plan beside the first one. ``gain``: GPU seconds of a sample that it spends more, relative."""

    step: PlayedStep
    gain: float
    differences: list[Difference]

    @property
    def together(self) -> float:
        """What of ``gain`` the differences one by one do not explain."""
        return self.gain - sum(difference.gain or 0.0 for difference in self.differences)


def run(*, plans: list[str], asked: Asked, as_json: bool) -> None:
    """Play the whole step of every plan, and of the first one with each difference alone.

    Raises CinemeshError for fewer than two plans, for what is no plan, and for a plan that the model, the batch or the
    cluster cannot have.
    """
    if len(plans) < 2:
        raise CinemeshError(f"compare: {len(plans)} plan given", remedy="name two or more, the one to start from first")
    chosen, load = plans_asked(plans, asked)
    requests = [asked_of(plan, load) for plan in chosen]
    evaluator = Evaluator(requests[0])
    alone = sum(1 for plan in chosen[1:] for _ in changes(chosen[0], plan))
    with progress("comparing", len(chosen) + alone, silent=as_json) as begin:
        steps: list[PlayedStep] = []
        for of, plan in zip(requests, chosen, strict=True):
            begin(f"playing {describe(plan)}")
            steps.append(evaluator.play_held(plan, of.samples)[0])
        first, others = steps[0], [_beside(evaluator, steps[0], step, begin) for step in steps[1:]]
    kernels = kernels_of(requests[0].cluster, requests[0].config, chosen[0].compute_dtype)
    if as_json:
        told = CompareReply(
            schema=Schema(name="compare"),
            model=load.model,
            cluster=requests[0].cluster.name,
            plans=[played_plan(request, step) for request, step in zip(requests, steps, strict=True)],
            against_the_first=[
                Against(gain=other.gain, differences=other.differences, together=other.together) for other in others
            ],
            kernels=kernels,
            error_bar=error_bar_of(requests[0]),
            taken=load.taken,
        )
        print(reply.text(told))
        return
    console = new_console()
    print_taken(console, load)
    console.print(heading(requests[0]))
    print_kernels(console, kernels)
    _print_steps(console, requests, steps)
    console.print(error_bar_of(requests[0]).text)
    for number, other in enumerate(others, 2):
        _print_differences(console, number, first, other)


# -- what differs -----------------------------------------------------------------------------------------------------


def changes(first: Plan, other: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """What differs between two plans: a name, and the other's values of the fields that belong to it."""
    grouped = {name: group for group, names in TOGETHER.items() for name in names}
    differ = [f.name for f in fields(Plan) if getattr(first, f.name) != getattr(other, f.name)]
    for name in dict.fromkeys(grouped.get(field, field) for field in differ):
        yield name, {field: getattr(other, field) for field in TOGETHER.get(name, (name,))}


def _beside(evaluator: Evaluator, first: PlayedStep, other: PlayedStep, begin: Begin) -> Beside:
    cost = first.gpu_s_per_sample
    differences: list[Difference] = []
    for name, values in changes(first.plan, other.plan):
        begin(f"changing {name} alone")
        differences.append(_difference(evaluator, first, name, values))
    return Beside(other, other.gpu_s_per_sample / cost - 1.0, differences)


def _difference(evaluator: Evaluator, first: PlayedStep, name: str, values: dict[str, Any]) -> Difference:
    """One change alone on the first plan; degrees take along what they forbid, as ``Plan.with_degrees`` does."""
    before, after = before_and_after(first.plan, values)
    try:
        degrees = tuple(values) == AXES
        plan = first.plan.with_degrees(**values) if degrees else replace(first.plan, **values)
        batch = evaluator.request.global_batch
        samples = first.batch.samples if batch is None else plan.local_batch(batch)
        (step,) = evaluator.play_held(plan, samples)
    except CinemeshError as error:
        return Difference(name=name, before=before, after=after, gain=None, problem=error.problem)
    gain = step.gpu_s_per_sample / first.gpu_s_per_sample - 1.0
    return Difference(name=name, before=before, after=after, gain=gain)


def before_and_after(first: Plan, values: dict[str, Any]) -> tuple[str, str]:
    """The fields that a change of a plan changes, as they are and as they would be."""
    changed = {field: value for field, value in values.items() if getattr(first, field) != value}
    return (
        ", ".join(_text(field, getattr(first, field)) for field in changed),
        ", ".join(_text(field, value) for field, value in changed.items()),
    )


def _text(field: str, value: object) -> str:
    """A field as ``Plan.parse`` reads it."""
    if isinstance(value, tuple):
        value = ":".join(map(str, value)) + (":" if len(value) == 1 else "")
    return f"{field}={str(value).lower() if isinstance(value, bool) else value}"


# -- as text ----------------------------------------------------------------------------------------------------------


def _print_steps(console: Console, requests: list[Request], steps: list[PlayedStep]) -> None:
    for number, step in enumerate(steps, 1):
        console.print(f"  {number}: {describe(step.plan)}")
    console.print()
    names = [str(number) for number in range(1, len(steps) + 1)]
    table = plain_table("", *names, right=names)
    rows = [played_plan(request, step) for request, step in zip(requests, steps, strict=True)]
    table.add_row("GPUs", *(f"{request.gpus:,}" for request in requests))
    table.add_row("samples of a step", *(f"{step.samples:,}" for step in steps))
    table.add_row("step, s", *(_seconds(step.step_s) for step in steps))
    table.add_row("samples/s", *(f"{row.samples_per_s:.2f}" for row in rows))
    table.add_row("GPU seconds of a sample", *(_seconds(step.gpu_s_per_sample) for step in steps))
    table.add_row("MFU", *(f"{row.mfu:.1%}" for row in rows))
    table.add_row("HFU", *(f"{row.hfu:.1%}" for row in rows))
    table.add_row("peak, GB", *(f"{row.peak_bytes / 1e9:.1f}" for row in rows))
    table.add_row("fits", *("yes" if row.fits else "NO" for row in rows))
    table.add_row("exposed, s", *(_seconds(row.exposed_s) for row in rows))
    terms = dict.fromkeys(name for row in rows for name in row.terms)
    for name in sorted(terms, key=lambda name: -max(row.terms.get(name, 0.0) for row in rows)):
        table.add_row(f"  {name}, s", *(_seconds(row.terms.get(name, 0.0)) for row in rows))
    console.print(table)


def _print_differences(console: Console, number: int, first: PlayedStep, other: Beside) -> None:
    console.print(f"\n{number} against 1: {_cost(other.gain)} for a sample")
    if not other.differences:
        console.print("  the same plan")
        return
    table = plain_table("  on its own", "costs", "in 1", f"in {number}", right=("costs",), breaks=("in 1",))
    for row in other.differences:
        table.add_row(f"  {row.name}", "not alone" if row.gain is None else _cost(row.gain), row.before, row.after)
    table.add_row("  together", _cost(other.together), "", "")
    console.print(table)
    for row in other.differences:
        if row.gain is None:
            console.print(f"  {row.name} cannot be changed alone: {row.problem}")


def _seconds(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-6 else "0"


def _cost(gain: float) -> str:
    return "nothing" if abs(gain) < LEAST else f"{gain:+.1%}"
