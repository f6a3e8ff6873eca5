"""``cinemesh plan --paper``: the paper's Table 3 as the cost model sees it, beside the best plans (torch-free).

What the paper leaves open of a plan is searched. The best plan has the same GPUs and global batch, and all else free. A
neutral group is what the paper chose among (A.2): plans of about equal throughput over different global batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rich.console import Console

from ...parallel.ir.plan import Plan
from ...perf_model.published.paper import STAGES, Stage
from ...perf_model.report import explain
from ...perf_model.report.explain import describe, digits
from ...perf_model.report.landscape import FAMILIES, neutral_groups
from ...perf_model.report.software import kernels_of
from ...perf_model.search.planner import NEAR, search, survey
from ...perf_model.search.request import LatentBucket, PricedPlan, Request
from ..progress import Begin, progress
from ..tables import TextTable, new_console, plain_table
from . import reply
from .ranked import ranked
from .relaunch import relaunch, relaunch_text
from .reply import Neutral, PaperReply, PaperStage, PaperTable, RankedPlan, Relaunch, Schema
from .software import print_kernels

NUMBERS = ("tokens", "GPUs", "batch", "lr", "steps", "step s", "samples/s", "MFU", "peak GB", "GPU hours")
NOT_NEUTRAL = f"no two batches are within {NEAR:.0%} of each other's samples/s"
Priced = Mapping[Stage, tuple[PricedPlan, PricedPlan]]  # of every row: the paper's plan, the best one


def alone(model: str, request: Request, *, as_json: bool) -> None:
    """Print the table alone. Raises CinemeshError as ``paper_table`` does."""
    found = paper_table(request, silent=as_json)
    kernels = kernels_of(request.cluster, request.config, Plan(dtype=request.dtype).compute_dtype)
    told = PaperReply(
        schema=Schema(name="paper"),
        model=model,
        cluster=request.cluster.name,
        **vars(found),
        kernels=kernels,
        error_bar=explain.error_bar_of(request),
    )
    if as_json:
        print(reply.text(told))
        return
    console = new_console()
    console.print(f"{request.config.name}, {request.cluster.name}, {request.dtype}. Predicted, not measured.")
    show(console, found)
    console.print(told.error_bar.text)
    print_kernels(console, kernels)


# -- as data ----------------------------------------------------------------------------------------------------------


def paper_table(request: Request, *, silent: bool) -> PaperTable:
    """All rows of Table 3 on the request's model and cluster. Raises CinemeshError where a row has no plan."""
    distinct = dict.fromkeys(map(_alike, STAGES))
    jobs = {(stage.latent, stage.gpus): stage for stage in reversed(distinct)}
    with progress("the paper's plans", 2 * len(distinct) + len(jobs), silent=silent) as begin:
        priced = {stage: _searched(request, stage, begin) for stage in distinct}
        neutral = [_neutral(request, first, priced, begin) for first in reversed(jobs.values())]
    best = [priced[_alike(stage)][1].plan for stage in STAGES]
    stages = [
        _row(request, stage, *priced[_alike(stage)], relaunch(request.config, request.cluster, before, after))
        for stage, before, after in zip(STAGES, [None, *best], best, strict=False)
    ]
    return PaperTable(
        stages=stages,
        paper_gpu_hours=sum(row.paper_gpu_hours for row in stages),
        best_gpu_hours=sum(row.best_gpu_hours for row in stages),
        near=NEAR,
        neutral=neutral,
    )


def _alike(stage: Stage) -> Stage:
    """Without what no plan depends on."""
    return replace(stage, lr=0.0, steps=0)


def _asked(request: Request, stage: Stage) -> Request:
    """A row's best plan."""
    buckets = (LatentBucket(stage.latent),)
    return replace(
        request, buckets=buckets, gpus=stage.gpus, global_batch=stage.global_batch, samples=1, fixed={}, shown=1
    )


def _searched(request: Request, stage: Stage, begin: Begin) -> tuple[PricedPlan, PricedPlan]:
    """The best plan of the paper's degrees, and the best of all."""
    asked = _asked(request, stage)
    begin(f"{stage.name} on {stage.gpus:,} GPUs")
    theirs = search(replace(asked, fixed=stage.fixed)).best
    begin(f"{stage.name} on {stage.gpus:,} GPUs, the best")
    return theirs, search(asked).best


def _row(request: Request, stage: Stage, theirs: PricedPlan, ours: PricedPlan, between: Relaunch | None) -> PaperStage:
    asked = _asked(request, stage)
    flops = explain.mean_sample_flops(asked)
    hours = stage.steps * stage.gpus / 3600.0  # a second of a step
    return PaperStage(
        stage=stage.name,
        tokens=request.config.tokens(stage.latent),
        gpus=stage.gpus,
        global_batch=stage.global_batch,
        lr=stage.lr,
        steps=stage.steps,
        paper=ranked(asked, theirs, flops),
        best=ranked(asked, ours, flops),
        best_over_paper=ours.samples_per_s / theirs.samples_per_s,
        paper_gpu_hours=theirs.step_s * hours,
        best_gpu_hours=ours.step_s * hours,
        relaunch=between,
    )


def _neutral(request: Request, first: Stage, priced: Priced, begin: Begin) -> Neutral:
    """Of a sample shape and number of GPUs: the fastest plans of one micro-batch, and those of the rows."""
    begin(f"{first.name} on {first.gpus:,} GPUs, other batches")
    asked = replace(_asked(request, first), global_batch=None, samples=first.samples, shown=FAMILIES)
    job = (first.latent, first.gpus)
    rows = [plan for stage, plans in priced.items() if (stage.latent, stage.gpus) == job for plan in plans]
    groups = neutral_groups(rows + survey(asked).choices, NEAR)
    flops = explain.mean_sample_flops(asked)
    return Neutral(
        stage=first.name,
        tokens=request.config.tokens(first.latent),
        gpus=first.gpus,
        groups=[[ranked(asked, choice, flops) for choice in group.choices] for group in groups],
    )


# -- as text ----------------------------------------------------------------------------------------------------------


def show(console: Console, found: PaperTable) -> None:
    """Two lines a row: the paper's plan, the best one."""
    columns = ("", "stage", "tokens", "GPUs", "batch", "lr", "steps", "", "plan", *NUMBERS[5:])
    table = plain_table(*columns, right=NUMBERS, breaks=("plan", "step s"))
    for number, row in enumerate(found.stages, 1):
        head = (str(number), row.stage, f"{row.tokens:,}", f"{row.gpus:,}", f"{row.global_batch:,}", f"{row.lr:.0e}")
        _add(table, (*head, f"{row.steps:,}", "paper's"), row.paper, row.paper_gpu_hours)
        _add(table, ("",) * 7 + ("best",), row.best, row.best_gpu_hours)
    console.print()
    console.print(table)
    hours = (found.paper_gpu_hours, found.best_gpu_hours)
    console.print(
        f"in all, as if every sample were as long as the tokens say: {hours[0]:,.0f} GPU hours with the paper's "
        f"degrees, {hours[1]:,.0f} with the best plans ({hours[1] / hours[0] - 1.0:+.1%})"
    )
    for number, row in enumerate(found.stages[1:], 2):
        console.print(f"from row {number - 1} to {number}: {relaunch_text(row.relaunch)}")
    for job in found.neutral:
        console.print(f"{job.stage}, {job.gpus:,} GPUs: {'; '.join(map(_said, job.groups)) or NOT_NEUTRAL}")


def _add(table: TextTable, head: tuple[str, ...], plan: RankedPlan, gpu_hours: float) -> None:
    table.add_row(
        *head,
        describe(Plan.from_dict(plan.plan)),
        digits(plan.step_s, 3),
        digits(plan.samples_per_s, 1),
        f"{plan.mfu:.1%}",
        f"{plan.peak_bytes / 1e9:.1f}",
        f"{gpu_hours:,.0f}",
    )


def _said(group: list[RankedPlan]) -> str:
    """A neutral group, by batch."""
    by_batch = sorted(group, key=lambda plan: plan.global_batch)
    plans = ", ".join(f"{p.global_batch:,} ({p.step_s:.3g} s, tp={p.plan['tp']} cp={p.plan['cp']})" for p in by_batch)
    rates = [plan.samples_per_s for plan in group]
    return f"neutral batches {plans}: {min(rates):,.1f} to {max(rates):,.1f} samples/s"
