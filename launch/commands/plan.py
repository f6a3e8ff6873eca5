"""``cinemesh plan``: which plan to run on a cluster, and why, as tables or JSON (torch-free)."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ...errors import CinemeshError
from ...files import atomic_file
from ...model.config import preset
from ...model.inputs import BatchShape
from ...parallel.ir.plan import Plan
from ...perf_model.clusters.cluster import load
from ...perf_model.prices.startup import start_up
from ...perf_model.published.paper import STAGES
from ...perf_model.report import explain
from ...perf_model.report.explain import Whole, describe, whole
from ...perf_model.search.planner import ERROR_BAR, Search, search
from ...perf_model.search.refusals import Refusal, RefusalKind
from ...perf_model.search.space import Bucket, Choice, Request
from .show import new_console, parse_latent, plain_table

NUMBERS = (
    "batch",
    "step s",
    "samples/s",
    "MFU",
    "beside compute",
    "peak GB",
    "tokens",
    "GPUs",
    "gain",
    "ranks",
    "MB",
    "s",
)  # right-aligned
DISAGREES = 0.01  # relative difference between the search's step time and the whole step's that is told


def run(
    *,
    model: str,
    gpus: int,
    cluster: str,
    latents: list[str],
    global_batch: int | None,
    samples: int,
    dtype: str,
    fix: str,
    encoders: bool,
    top: int,
    tune: bool,
    explain_it: bool,
    paper: bool,
    report: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Search, print, and write what was asked for.

    Raises CinemeshError for an unknown model or cluster, an illegal latent, and where no plan fits.
    """
    gc.disable()  # records are made once and live on: the collector would walk them all again and again
    request = Request(
        config=preset(model),
        buckets=tuple(_bucket(text) for text in latents),
        cluster=load(cluster),
        gpus=gpus,
        global_batch=global_batch,
        samples=samples,
        dtype=dtype,  # type: ignore[arg-type]  # Plan checks it
        fixed=_fixed(fix),
        encoders=encoders,
        shown=top,
    )
    found = search(request)
    if tune:
        from rich.progress import track

        from ...perf_model.search.tune import tuned

        console = Console(stderr=True)
        found = tuned(request, found, partial(track, description="tuning", console=console, transient=True))
    flops = explain.mean_model_flops(request)
    values = {
        "model": model,
        "cluster": request.cluster.name,
        "gpus": gpus,
        "predicted": True,
        "best": _choice(found.best) | {"mfu": explain.mfu_of(request, found.best, flops)},
        "ranked": [_choice(choice) for choice in found.choices],
        "near_ties": [_choice(choice) for choice in found.near_ties()],
        "refused": [refusal.to_dict() for refusal in found.refused],
        "played": found.played,
        "bounded": found.bounded,
        "start_up": _start_up(found.best.plan, request),
    }
    console = new_console()
    if not as_json:
        _print_search(console, request, found, flops)
    if paper:
        rows = paper_rows(request)
        values["paper"] = rows
        if not as_json:
            _print_paper(console, rows)
    if explain_it:
        values["why"] = why = _why(request, found)
        if not as_json:
            _print_why(console, why)
            _print_start_up(console, values["start_up"])
    if out is not None:
        with atomic_file(out) as unfinished:
            unfinished.write_text(found.best.plan.to_yaml())
    if report is not None:
        from ...perf_model.report.report import write

        write(report, request, found)
    if as_json:
        print(json.dumps(values, indent=1))


def whole_of(request: Request, choice: Choice) -> Whole:
    batch = BatchShape(choice.samples, request.buckets[0].latent)
    return whole(request.config, choice.plan, batch, request.cluster, choice.frozen)


def _bucket(text: str) -> Bucket:
    latent, colon, weight = text.partition(":")
    try:
        share = float(weight) if colon else 1.0
    except ValueError:
        share = -1.0
    if not 0.0 < share < float("inf"):
        raise CinemeshError(
            f"latent {text!r}: the weight {weight!r} is no positive number", remedy=f"write for example {latent}:0.5"
        )
    return Bucket(parse_latent(latent), share)


def _fixed(text: str) -> dict[str, object]:
    """Plan fields given by hand, checked by the plan itself."""
    if not text:
        return {}
    plan = Plan.parse(text, tp=2, cp=2, dp_shard=2)  # degrees left open allow every overlap
    given = {item.partition("=")[0].strip() for item in text.split(",")}
    return {name: getattr(plan, name) for name in given}


# -- as data ----------------------------------------------------------------------------------------------------------


def _choice(choice: Choice) -> dict[str, object]:
    return {
        "plan": choice.plan.to_dict(),
        "samples": choice.samples,
        "global_batch": choice.global_batch,
        "step_s": choice.step_s,
        "samples_per_s": choice.samples_per_s,
        "compute_s": choice.compute_s,
        "step_s_error": choice.step_s * ERROR_BAR,
        "bound_s": choice.bound_s,
        "peak_bytes": choice.peak_bytes,
        "sharded_encoders": list(choice.frozen.sharded) if choice.frozen else [],
    }


def paper_rows(request: Request) -> list[dict[str, object]]:
    """The plans of Table 3 beside the best for the same samples and GPUs."""
    rows: list[dict[str, object]] = []
    for stage in STAGES:
        asked = replace(
            request,
            buckets=(Bucket(stage.latent),),
            gpus=stage.gpus,
            samples=stage.samples,
            global_batch=None,
            shown=1,
        )
        theirs = search(replace(asked, fixed=stage.fixed)).best
        ours = search(asked).best
        rows.append(
            {
                "stage": stage.name,
                "tokens": request.config.tokens(stage.latent),
                "gpus": stage.gpus,
                "paper": _choice(theirs),
                "best": _choice(ours),
                "best_over_paper": ours.samples_per_s / theirs.samples_per_s,
            }
        )
    return rows


def _start_up(plan: Plan, request: Request) -> dict[str, Any]:
    """The communicators that a rank holds under a plan, with their bytes and seconds, each and in all."""
    rows = start_up(plan, request.cluster)
    return {
        "communicators": len(rows),
        "bytes": sum(row.bytes for row in rows),
        "seconds": sum(row.seconds for row in rows),
        "each": [asdict(row) for row in rows],
    }


def _why(request: Request, found: Search) -> dict[str, object]:
    best = whole_of(request, found.best)
    runner_up = whole_of(request, found.choices[1]) if len(found.choices) > 1 else None
    return {
        "whole_step_s": best.step_s,
        "searched_step_s": found.best.step_s,
        "hfu": explain.hfu(best, request.cluster),
        "utilisation": explain.utilisation(best),
        "binds": explain.binds(best),
        "exposed": [asdict(row) for row in explain.exposures(best) if row.exposed_s > 0],
        "duplicates": [asdict(row) for row in explain.duplicates(best)],
        "runner_up": explain.why_lost(best, runner_up) if runner_up else [],
        "sensitivities": [
            asdict(row) | {"plan": row.plan.to_dict() if row.plan else None}
            for row in explain.sensitivities(request, found.best)
        ],
    }


# -- as text ----------------------------------------------------------------------------------------------------------


def _print_search(console: Console, request: Request, found: Search, flops: float) -> None:
    config, cluster = request.config, request.cluster
    shapes = ", ".join(f"{'x'.join(map(str, b.latent))} ({config.tokens(b.latent):,} tokens)" for b in request.buckets)
    console.print(
        f"{config.name} on {request.gpus:,} GPUs of {cluster.name}, {shapes}, {request.dtype}. "
        "Predicted, not measured.\n"
    )
    table = plain_table("", "plan", "batch", "step s", "samples/s", "MFU", "beside compute", "peak GB", right=NUMBERS)
    ties = {id(choice) for choice in found.near_ties()}
    for rank, choice in enumerate(found.choices, 1):
        table.add_row(
            f"{rank}{'=' if id(choice) in ties else ''}",
            describe(choice.plan),
            f"{choice.global_batch:,}",
            f"{choice.step_s:.3f} ±{choice.step_s * ERROR_BAR:.2g}",
            f"{choice.samples_per_s:.1f}",
            f"{explain.mfu_of(request, choice, flops):.1%}",
            f"{choice.exposed:.1%}",
            f"{choice.peak_bytes / 1e9:.1f}",
        )
    console.print(table)
    if ties:
        console.print(f"= near-tie: within {found.error:.1%}, which the model cannot tell apart")
    console.print(f"± {ERROR_BAR:.1%}: error of these prices on other trainers' published steps left out of the fit")
    console.print(
        f"{cluster.memory.usable_bytes / 1e9:.1f} GB are usable on a GPU; "
        f"{found.played} plans played, {found.bounded} bounded, {len(found.refused)} families refused, for example:"
    )
    for refusal in _telling(found.refused):
        console.print(f"  {refusal.family}: {refusal.reason}")


def _telling(refused: list[Refusal]) -> list[Refusal]:
    """The first refusal of each kind."""
    kinds: dict[RefusalKind, Refusal] = {}
    for refusal in refused:
        kinds.setdefault(refusal.kind, refusal)
    return list(kinds.values())


def _print_paper(console: Console, rows: list[dict[str, object]]) -> None:
    table = plain_table("stage", "tokens", "GPUs", "paper's plan", "step s", "best", "step s", "gain", right=NUMBERS)
    for row in rows:
        theirs, ours = row["paper"], row["best"]
        assert isinstance(theirs, dict) and isinstance(ours, dict)
        gain = row["best_over_paper"]
        assert isinstance(gain, float)
        table.add_row(
            str(row["stage"]),
            f"{row['tokens']:,}",
            f"{row['gpus']:,}",
            describe(Plan.from_dict(theirs["plan"])),
            f"{theirs['step_s']:.3f}",
            describe(Plan.from_dict(ours["plan"])),
            f"{ours['step_s']:.3f}",
            f"{gain - 1:+.1%}",
        )
    console.print()
    console.print(table)


def _print_why(console: Console, values: dict[str, object]) -> None:
    def lines(title: str, rows: list[str]) -> None:
        if rows:
            console.print(f"\n{title}")
            for row in rows:
                console.print(f"  {row}")

    binds, runner_up = values["binds"], values["runner_up"]
    exposed, duplicates, changes = values["exposed"], values["duplicates"], values["sensitivities"]
    assert isinstance(binds, list) and isinstance(runner_up, list)
    assert isinstance(exposed, list) and isinstance(duplicates, list) and isinstance(changes, list)
    whole_s, searched_s = values["whole_step_s"], values["searched_step_s"]
    assert isinstance(whole_s, float) and isinstance(searched_s, float)
    difference = whole_s / searched_s - 1.0
    told = "" if abs(difference) <= DISAGREES else ": trust the whole step"
    console.print(f"\nbest plan, every record played: {whole_s:.3f} s, {difference:+.2%} from the search{told}")
    lines("what binds", binds)
    utilisation = values["utilisation"]
    assert isinstance(utilisation, dict)
    lines("busy share of the step", ["  ".join(f"{lane} {share:.1%}" for lane, share in utilisation.items())])
    lines(
        "exposed communication",
        [
            f"{e['name']} ({e['kind']}, {e['lane']}): {e['exposed_s']:.4f} s of {e['alone_s']:.4f} s"
            for e in exposed[:12]
        ],
    )
    lines(
        "duplicates: what every rank of an axis does or holds identically",
        [
            f"{d['name']} on {d['axis']} ({d['ranks']} ranks, {d['count']} times): {d['flops'] / 1e9:.1f} GFLOP, "
            f"{d['bytes'] / 1e9:.2f} GB written, {d['saved_s'] * 1e3:.2f} ms could be saved"
            for d in duplicates[:8]
        ],
    )
    lines("why the runner-up lost", runner_up)
    lines("what would change it", [f"{c['change']}: {c['gain']:+.1%} samples/s; {c['note']}" for c in changes])


def _print_start_up(console: Console, values: dict[str, Any]) -> None:
    if not values["communicators"]:
        return
    console.print(
        f"\ncommunicators of a rank: {values['communicators']}, {values['bytes'] / 1e9:.2f} GB, "
        f"{values['seconds']:.1f} s to make when the job starts (from what is published of whole jobs)"
    )
    table = plain_table("communicator", "ranks", "thread blocks", "priority", "MB", "s", right=NUMBERS)
    for row in values["each"]:
        table.add_row(
            row["name"],
            f"{row['ranks']:,}",
            str(row["ctas"]) if row["ctas"] else "NCCL's",
            "high" if row["high_priority"] else "normal",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['seconds']:.1f}",
        )
    console.print(table)
