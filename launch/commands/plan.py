"""``cinemesh plan``: which plan to run on a cluster, and why, as tables or JSON (torch-free)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ...errors import CinemeshError
from ...files import atomic_file, check_output_file, check_output_folder
from ...memory import uncollected
from ...model.config import latent_text
from ...parallel.ir.plan import fields_of
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.report import explain
from ...perf_model.report.explain import describe, digits
from ...perf_model.report.software import kernels_of, other_software
from ...perf_model.search.planner import Nearby, Search, nearby, search
from ...perf_model.search.refusals import Refusal, RefusalKind
from ...perf_model.search.request import Request
from ...perf_model.search.samples import WITHIN, TriedSamples, search_samples
from ..options import On
from ..plans import SUFFIXES, held_fields
from ..progress import Begin, each, progress
from ..tables import new_console, plain_table
from ..written import command, wrote
from . import reply
from .asked import Workload, print_taken, workload
from .lifetime import Lives, check_asked
from .paper import alone, paper_table, show
from .ranked import ranked
from .reasons import Reasons, start_up_cost
from .recipe_run import Steps, encoders_told, print_recipe_run, recipe_run
from .reply import NearbyPlan, PlanReply, RankedPlan, RecipeRun, Refused, Schema
from .software import print_kernels, print_order, print_others

NUMBERS = (
    "batch",
    "step s",
    "samples/s",
    "MFU",
    "beside compute",
    "peak GB",
)  # right-aligned
LATENT_NUMBERS = ("tokens", "share", "samples a rank", "batch", "step s", "samples/s", "MFU")
HELD = {True: "the plan of the longest latent", False: "the same tp and cp"}


@uncollected()
def run(  # noqa: PLR0913  the options of the command
    *,
    on: On,
    gpus: int | None,
    latents: Sequence[str] = (),
    dtype: str | None = None,
    recipe: Path | None = None,
    fix: str = "",
    top: int,
    tune: bool,
    explain_it: bool,
    paper: bool,
    goodput: bool = False,
    price: float | None = None,
    report: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Search, print, and write what was asked for. Without ``gpus``: the paper's table alone.

    Raises CinemeshError for a search without GPUs, an unknown model or cluster, an illegal latent, where no plan fits,
    and, before the search, for what cannot be written.
    """
    load = workload(on, latents, dtype, recipe)
    gpus = gpus or load.gpus
    check_asked(load.cluster, goodput, price)
    if gpus is None:
        of_search = {"--latent": latents, "--global-batch": on.global_batch, "--samples": on.samples, "--fix": fix,
                     "--tune": tune, "--explain": explain_it, "--goodput": goodput, "--report": report,
                     "--out": out}  # fmt: skip
        _check_no_search(paper, [name for name, value in of_search.items() if value])
    if out is not None:
        if out.suffix not in SUFFIXES:
            raise CinemeshError(f"--out {out}: a plan file ends in .yaml", remedy="write for example --out best.yaml")
        check_output_file(out, "--out")
    if report is not None:
        check_output_folder(report, "--report")
    request = Request(
        config=load.config,
        buckets=load.buckets,
        cluster=load.cluster,
        gpus=gpus or load.cluster.gpus,
        global_batch=load.global_batch,
        samples=load.samples or 1,
        dtype=load.dtype,
        fixed=load.held | held_fields(fields_of(fix)),
        encoders=load.encoders,
        shown=top,
    )
    if gpus is None:
        alone(load.model, request, as_json=as_json)
        return
    tried: list[TriedSamples] = []
    if load.samples is None and load.global_batch is None:
        request, found, tried = search_samples(request)
    else:
        found = search(request)
    others = nearby(request, found)
    if tune:
        from ...perf_model.search.tune import tuned

        with progress("tuning", len(found.choices), silent=as_json) as begin:
            found = tuned(request, found, lambda choices: each(choices, begin, lambda choice: describe(choice.plan)))
    flops = explain.mean_sample_flops(request)
    told = replace(
        _reply(load.model, request, found, flops),
        samples_tried=tried,
        nearby=[_near(request, other, flops) for other in others],
        taken=load.taken,
        run=_run(load, found),
    )
    lives = Lives.of(request, found, goodput)
    told = replace(told, lifetime=lives.best, by_samples_per_day=lives.order)
    console = new_console()
    if not as_json:
        print_taken(console, load)
        _print_search(console, request, found, flops)
        if len(request.buckets) > 1:
            _print_latents(console, told.plans[0])
        _print_samples(console, request, tried)
        _print_nearby(console, request, others)
        print_kernels(console, told.kernels)
        print_order(console, told.order)
        print_others(console, found.best.step_s, told.other_software)
        if told.run is not None:
            console.print("\na run of it under the best plan\n")
            print_recipe_run(console, told.run)
        lives.print(console, price)
    if paper:
        rows = paper_table(request, silent=as_json)
        told = replace(told, paper=rows)
        if not as_json:
            show(console, rows)
    if explain_it:
        with progress("explaining", explain.CHANGES + 2, silent=as_json) as begin:
            why = _why(request, found, begin)
        told = replace(told, why=why.told)
        if not as_json:
            why.print(console)
    if out is not None:
        with atomic_file(out) as unfinished:
            unfinished.write_text(found.best.plan.to_yaml(), encoding="utf-8")
        lint = f"{command('lint', plan=out, model=load.model)}, then cinemesh train CONFIG"
        start = lint if recipe is None else command("train", recipe)
        wrote(out, f"{start} --plan {shlex.quote(str(out))}")
    if report is not None:
        from ...perf_model.report.report import PAGE, TRACE, pieces, write

        with progress("report", pieces(request, found), silent=as_json) as begin:
            write(report, request, found, begin)
        wrote(report / PAGE, f"open it in a browser, and {report / TRACE} at https://ui.perfetto.dev")
    if as_json:
        print(reply.text(told))


def _check_no_search(paper: bool, asked: list[str]) -> None:
    """Raise CinemeshError where no number of GPUs is given and more than the paper's table is asked for."""
    if not paper or asked:
        why = f"{', '.join(asked)}: of a search, and for" if paper else "for"
        raise CinemeshError(
            f"{why} how many GPUs is not said", remedy="add --gpus 6144, or ask for the paper's plans alone: --paper"
        )


def _run(load: Workload, found: Search) -> RecipeRun | None:
    """What a run of the recipe would be under the best plan."""
    if load.steps is None:
        return None
    steps = Steps(load.steps, [bucket.weight for bucket in load.buckets], [bucket.latent for bucket in load.buckets])
    best = found.best
    played = found.evaluator.plays(best.plan, best.samples, best.frozen)
    return recipe_run(load.config, load.cluster, best.plan, played, steps)


# -- as data ----------------------------------------------------------------------------------------------------------


def _reply(model: str, request: Request, found: Search, flops: float) -> PlanReply:
    cluster, best, ties = request.cluster, found.best, {id(choice) for choice in found.near_ties()}

    def price(other: Cluster) -> float:
        return found.evaluator.on(other).settled(replace(best, bound_s=0.0)).step_s

    return PlanReply(
        schema=Schema(name="plan"),
        model=model,
        cluster=cluster.name,
        gpus=request.gpus,
        plans=[ranked(request, choice, flops) for choice in found.choices],
        refused=[
            Refused(
                **refusal.family._asdict(),
                kind=refusal.kind,
                reason=refusal.reason,
                needs_bytes=refusal.needs_bytes,
                free_bytes=refusal.free_bytes,
            )
            for refusal in found.refused
        ],
        near_ties=[place for place, choice in enumerate(found.choices) if id(choice) in ties],
        near=found.error,
        played=found.played,
        bounded=found.bounded,
        start_up=start_up_cost(best.plan, cluster),
        kernels=kernels_of(cluster, request.config, best.plan.compute_dtype),
        other_software=other_software(cluster, request.config, best.plan.compute_dtype, best.step_s, price),
        error_bar=explain.error_bar_of(request),
        order=cluster.order_told(),
    )


def _near(request: Request, other: Nearby, flops: float) -> NearbyPlan:
    asked = replace(request, gpus=other.gpus)
    return NearbyPlan(gpus=other.gpus, gain=other.gain, best=ranked(asked, other.best, flops))


def _print_samples(console: Console, request: Request, tried: list[TriedSamples]) -> None:
    """How many samples a data rank takes, and what others would give."""
    for bucket, batch in zip(request.buckets, request.batches(request.samples), strict=True):
        latent = latent_text(bucket.latent)
        of = [one for one in tried if one.latent == latent]
        shown = ", ".join(f"{one.samples} give {'at most ' * one.at_most}{digits(one.samples_per_s, 1)}" for one in of)
        if of:
            console.print(
                f"samples of a data rank{f' of {latent}' * (len(request.buckets) > 1)}: {batch.samples}, the fewest "
                f"within {WITHIN:.0%} of the best; under {HELD[of[0].under_its_plan]} {shown} samples/s"
            )


def _print_latents(console: Console, plan: RankedPlan) -> None:
    """A step of each latent under the best plan, where they are several."""
    table = plain_table("latent", *LATENT_NUMBERS, right=LATENT_NUMBERS)
    for step in plan.latents:
        table.add_row(
            step.latent,
            f"{step.tokens:,}",
            f"{step.share:.0%}",
            f"{step.samples:,}",
            f"{step.global_batch:,}",
            digits(step.step_s, 3),
            digits(step.samples_per_s, 1),
            f"{step.mfu:.1%}",
        )
    console.print("\nsteps of the best plan, by latent; in a recipe the batch is that of the bucket (global_batch)")
    console.print(table)


def _print_nearby(console: Console, request: Request, others: list[Nearby]) -> None:
    """What would be better than what was asked for, close by."""
    server = request.cluster.gpus_per_server
    for other in others:
        best, left = other.best, request.gpus - other.gpus
        what = f"a global batch of {request.batch_text(best.global_batch)}"
        if left:
            servers = f" ({left // server:,} servers)" if left % server == 0 else ""
            what = f"{other.gpus:,} GPUs, with {left:,} left out{servers},"
        console.print(
            f"close by: {what} would give {digits(best.samples_per_s, 1)} samples/s, {other.gain:.1%} more: "
            f"{describe(best.plan)}"
        )


def _why(request: Request, found: Search, begin: Begin) -> Reasons:
    """Why the best plan of a search won."""
    begin("playing whole steps")
    evaluator = found.evaluator
    best, *others = (evaluator.play(choice.plan, choice.samples, choice.frozen) for choice in found.choices[:2])
    changed = list(explain.sensitivities(request, found, begin))
    begin("pricing alternatives")
    return replace(
        Reasons.of(request, best[0], others[0][0] if others else None, changed),
        whole_s=evaluator.cost_of(best).step_s,
        searched_s=found.best.step_s,
    )


# -- as text ----------------------------------------------------------------------------------------------------------


def _print_search(console: Console, request: Request, found: Search, flops: float) -> None:
    config, cluster = request.config, request.cluster
    shapes = ", ".join(f"{'x'.join(map(str, b.latent))} ({config.tokens(b.latent):,} tokens)" for b in request.buckets)
    console.print(
        f"{config.name} on {request.gpus:,} GPUs of {cluster.name}, {shapes}, {request.dtype}. "
        "Predicted, not measured.\n"
    )
    columns = ("", "plan", "batch", "step s", "samples/s", "MFU", "beside compute", "peak GB")
    table = plain_table(*columns, right=NUMBERS, breaks=("batch",))
    ties, bar = {id(choice) for choice in found.near_ties()}, explain.error_bar_of(request)
    for rank, choice in enumerate(found.choices, 1):
        table.add_row(
            f"{rank}{'=' if id(choice) in ties else ''}",
            describe(choice.plan),
            request.batch_text(choice.global_batch),
            f"{digits(choice.step_s, 3)} {choice.step_s * bar.low:+.2g} {choice.step_s * bar.high:+.2g}",
            digits(choice.samples_per_s, 1),
            f"{explain.mfu_of(request, choice, flops):.1%}",
            f"{choice.beside_compute:.1%}",
            f"{choice.peak_bytes / 1e9:.1f}",
        )
    console.print(table)
    if (frozen := found.best.frozen) is not None:
        shards = f"; in shards: {', '.join(frozen.sharded)}" if frozen.sharded else ""
        console.print(f"{encoders_told(frozen.seconds, found.best.step_s)}, {frozen.bytes / 1e9:.2f} GB a GPU{shards}")
    if ties:
        console.print(f"= near-tie: within {found.error:.1%}, which the model cannot tell apart")
    console.print(
        "Step times are of each plan's own program, played record by record"
        + ("." if found.played_whole == len(found.choices) else ", until nothing changes from one block to the next.")
    )
    console.print(bar.text)
    console.print(
        f"{cluster.memory.usable_bytes / 1e9:.1f} GB are usable on a GPU; "
        f"{found.played} plans priced, {found.bounded} bounded, {len(found.refused)} families refused, for example:"
    )
    for refusal in _telling(found.refused):
        console.print(f"  {refusal.family}: {refusal.reason}")


def _telling(refused: list[Refusal]) -> list[Refusal]:
    """The first refusal of each kind."""
    kinds: dict[RefusalKind, Refusal] = {}
    for refusal in refused:
        kinds.setdefault(refusal.kind, refusal)
    return list(kinds.values())
