"""``cinemesh trace``: run a small plan on gloo processes and show when every op and collective ran.

Prints, for every collective, how much of it compute hid and how much it waited for, predicted beside measured, and
writes both to one trace: a process for each rank, and one for the prediction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ...errors import CinemeshError
from ...files import check_output_file
from ...model.step import build_step, check
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.span import Span
from ...parallel.passes.pipeline import prepare
from ...parallel.runtime.trace import OverlapRow, role, summary
from ...perf_model.clusters.cluster import Cluster, load
from ...perf_model.prices.played import PlayedStep, play_program
from ...perf_model.report.trace import predicted, waits, write
from ..models import read_model
from ..plans import read_plan
from ..preflight import check_host_memory
from ..proof.parity import OPTIMIZER, Case
from ..proof.traced import traced
from ..tables import new_console, plain_table
from ..written import wrote


def predict(case: Case, cluster: Cluster) -> PlayedStep:
    """The program that the ranks run, played on a cluster."""
    built = build_step(case.config, case.plan, case.batch, OPTIMIZER, seed=case.seed)
    return play_program(prepare(built, backend="gloo"), case.batch, cluster)


def beside(by_rank: Sequence[Sequence[Span]], whole: PlayedStep) -> dict[str, Sequence[Span]]:
    """One recording a rank and the prediction, from the start of the first step, with the waits of compute."""
    first = min(span.issued_s for spans in by_rank for span in spans)
    recordings: dict[str, Sequence[Span]] = {
        f"rank {rank}, measured": [
            replace(span, issued_s=span.issued_s - first, start_s=span.start_s - first, end_s=span.end_s - first)
            for span in spans
        ]
        for rank, spans in enumerate(by_rank)
    }
    expected = predicted(whole)
    return {**recordings, "predicted": [*expected, *waits(expected)]}


def predicted_rows(whole: PlayedStep) -> dict[str, tuple[float, float]]:
    """By role: seconds that its collectives run in one step, and of those exposed."""
    rows: dict[str, tuple[float, float]] = {}
    for i, op in enumerate(whole.program.ops):
        if op.comm is not None and not op.is_wait:
            ran, exposed = rows.get(role(op), (0.0, 0.0))
            timeline = whole.timeline
            alone = whole.tape.records[i].cost.seconds  # of a fused record, which computes as well
            ran += alone if op.kind in FUSED else timeline.end[i] - timeline.start[i]
            rows[role(op)] = ran, exposed + timeline.exposed_s.get(i, 0.0)
    return rows


def run(*, plan: str, model: str, out: Path, steps: int, max_procs: int, cluster: str, as_json: bool) -> None:
    """Trace, write ``out`` and print the table.

    Raises CinemeshError when the plan does not suit model or machine, and for an ``out`` that cannot be written.
    """
    check_output_file(out, "--out")
    chosen, priced_on = read_plan(plan, dtype="float32"), load(cluster)
    if priced_on.gloo is None:
        raise CinemeshError(
            f"--cluster {cluster} has GPUs, and a trace runs on CPU processes",
            remedy="leave it out, or give the file that cinemesh calibrate wrote",
        )
    if chosen.world_size > max_procs:
        raise CinemeshError(
            f"{chosen.equation()} processes > --max-procs {max_procs}", remedy="trace a smaller plan, or allow as many"
        )
    named = read_model(model)
    case = Case(chosen, named.config, 1, named.latent(), steps)
    check(case.config, chosen, case.batch)
    whole = predict(case, priced_on)
    check_host_memory([whole.program], chosen.world_size)
    by_rank = traced(case)
    write(out, beside(by_rank, whole))
    wrote(out, "open it at https://ui.perfetto.dev", f"{sum(map(len, by_rank))} spans of {len(by_rank)} ranks")
    rows = summary(by_rank[0])
    if as_json:
        spans = [[asdict(span) for span in spans] for spans in by_rank]
        expected = [asdict(span) for span in predicted(whole)]
        collectives = [asdict(row) | _predicted_of(row, whole, steps) for row in rows]
        print(json.dumps({"collectives": collectives, "spans": spans, "predicted": expected}))
        return
    _show(by_rank[0], whole, priced_on, steps)


def _predicted_of(row: OverlapRow, whole: PlayedStep, steps: int) -> dict[str, float]:
    """Of as many steps as the row counts."""
    ran, exposed = predicted_rows(whole)[row.role]
    return {"predicted_ran_s": ran * steps, "predicted_exposed_s": exposed * steps}


def _show(spans: list[Span], whole: PlayedStep, cluster: Cluster, steps: int) -> None:
    """Means of one step, on rank 0."""
    console = new_console()
    total_s = (max(s.end_s for s in spans) - spans[0].issued_s) / steps
    console.print(
        f"plan {whole.plan.equation()}, rank 0: a step took {total_s * 1e3:.1f} ms (mean of {steps}, measured); "
        f"{whole.timeline.step_s * 1e3:.1f} ms were predicted by {cluster.name}"
    )
    if cluster.has_placeholders("gloo"):
        console.print("Its numbers are placeholders: calibrate this machine and give the file with --cluster.")
    numbers = ("a step", "ran", "predicted", "overlapped", "exposed", "predicted")
    table = plain_table("collective, ms a step", "lane", *numbers, right=numbers, breaks=("a step",))
    rows, expected = summary(spans), predicted_rows(whole)
    for row in rows:
        ran, overlapped, exposed = (seconds / steps for seconds in (row.ran_s, row.overlapped_s, row.exposed_s))
        would_run, would_wait = expected[row.role]
        numbers = (f"{seconds * 1e3:.2f}" for seconds in (ran, would_run, overlapped, exposed, would_wait))
        table.add_row(row.role, row.lane, str(row.count // steps), *numbers)
    console.print(table)
    ran, exposed = sum(row.ran_s for row in rows), sum(row.exposed_s for row in rows)
    if ran:
        hidden = max(0.0, 1 - exposed / ran)  # a wait may last longer than what is waited for ran
        console.print(
            f"communication ran {ran / steps * 1e3:.1f} ms, of which compute hid {hidden:.0%}; exposed: "
            f"{exposed / steps / total_s:.1%} of the step, predicted "
            f"{whole.timeline.total_exposed_s / whole.timeline.step_s:.1%}"
        )
