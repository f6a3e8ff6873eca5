"""``cinemesh validate``: predictions beside published measurements, as tables or JSON (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ...perf_model.calibration import fit
from ...perf_model.published import validate
from ...perf_model.published.evidence import Way, covered
from ...perf_model.published.own_rows import OwnPrediction
from ...perf_model.published.rows import TRUSTED, Unpredictable, case_of, read
from ...perf_model.published.validate import (
    Prediction,
    Summary,
    ValidationReport,
    by_source,
    left_out,
    source_means,
    summarise,
)
from ...perf_model.report.explain import describe
from ..progress import progress
from ..tables import new_console, plain_table

SOURCE_WIDTH = 58
HELD = {
    Way.UNDESCRIBED: "where only the day of their software is known",
    Way.GAP: "where rows leave one thing out besides",
    Way.HELD_OUT: "where all of it is known",
}
NUMBERS = (
    "rows",
    "mean",
    "median",
    "95th",
    "worst",
    "bias",
    "measured",
    "predicted",
    "measured s",
    "predicted s",
    "ratio",
    "error",
    "plans",
    "now",
    "fitted",
)


def run(*, rows: Sequence[Path], cluster: str | None, show_all: bool, refit: bool, as_json: bool) -> None:
    """Predict files of rows (the published ones by default) and print the errors.

    ``cluster``: of own runs, in place of their rows'. ``refit`` searches the fitted constants again, with every source
    left out in turn: minutes. Raises CinemeshError for a file that holds no such rows, and for a row that is wrong.
    """
    report = validate.validate(rows, cluster=cluster)
    values = validate.to_json(report)
    fits = _fits(rows, silent=as_json) if refit else []
    if refit:
        values["fit"] = [
            {
                **f.__dict__,
                "undescribed": summarise(f.undescribed).__dict__ if f.undescribed else None,
                "held_out": summarise(f.held_out).__dict__ if f.held_out else None,
            }
            for f in fits
        ]
    if as_json:
        print(json.dumps(values, indent=1, default=_plain))
        return
    console = new_console()
    if report.own:
        _print_own(console, report.own)
    if show_all:
        _print_rows(console, report)
    if report.times or report.memory or report.verdicts or report.skipped:
        _print_sources(console, report)
    if report.choices:
        _print_choices(console, report)
    for found in fits:
        _print_fit(console, found)


def _plain(value: object) -> object:
    return value.__dict__ if hasattr(value, "__dict__") else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _print_rows(console: Console, report: ValidationReport) -> None:
    shown = ("measured", "predicted", "error")
    table = plain_table("row", "unit", *shown, "software", right=NUMBERS, breaks=("unit", "software"))
    for p in (*report.times, *report.memory):
        numbers = (f"{p.measured:.4g}", f"{p.predicted:.4g}", f"{100 * p.error:+.1f} %")
        table.add_row(p.id, p.unit, *numbers, f"its day's: {p.attention}; {p.bar.span}" if p.bar else "")
    for v in report.verdicts:
        words = ["out of memory" if out else "fits" for out in (v.measured, v.predicted)]
        table.add_row(v.id, "", words[0], words[1], "" if v.measured == v.predicted else "wrong", "")
    console.print(table)
    skipped = plain_table("not predicted", "why", breaks=("why",))
    for name, why in report.skipped:
        skipped.add_row(name, why)
    if report.skipped:
        console.print()
        console.print(skipped)
    console.print()


def _print_own(console: Console, own: Sequence[OwnPrediction]) -> None:
    """Steps of this trainer: what was measured beside what its own program is predicted to take."""
    columns = ("own run", "plan", "cluster", "measured s", "predicted s", "ratio", "bar")
    table = plain_table(*columns, right=NUMBERS, breaks=("plan",))
    for p in own:
        times, (low_s, high_s) = p.row.measured, p.span
        table.add_row(
            p.row.id,
            describe(p.plan),
            p.cluster,
            f"{times.iter_time_s:.3g} ({times.iter_time_low_s:.3g} to {times.iter_time_high_s:.3g})",
            f"{p.predicted_s:.3g} ({low_s:.3g} to {high_s:.3g})",
            f"{p.ratio:.2f}",
            "within" if p.within else "OUTSIDE",
        )
    console.print(table)
    for says in dict.fromkeys(f"{p.cluster}: {p.bar.text}" for p in own):
        console.print(says)
    console.print("measured: the median of a row's steps, and what nine of ten lie between; ratio: predicted over it")


def _line(summary: Summary) -> tuple[str, ...]:
    errors = (summary.mean, summary.median, summary.p95, summary.worst)
    return (str(summary.rows), *map(_percent, errors), f"{100 * summary.bias:+.1f} %")


def _print_sources(console: Console, report: ValidationReport) -> None:
    columns = ("rows", "mean", "median", "95th", "worst", "bias")
    table = plain_table("absolute error of time, by source", *columns, right=NUMBERS, breaks=("rows",))
    for name, way in (("its software too, but its day", Way.UNDESCRIBED), ("its software known", Way.HELD_OUT)):
        table.add_row(f"each source left out, {name}", *_line(left_out(way)))
    if report.undescribed:
        table.add_row("none left out, only the day of their software known", *_line(summarise(report.undescribed)))
    for source, predictions in by_source(report.times).items():
        table.add_row(source[:SOURCE_WIDTH], *_line(summarise(predictions)))
    kinds: list[tuple[str, Sequence[Prediction]]] = [
        ("steps and layers, trust A", report.headline),
        ("attention alone", [p for p in report.times if p.kind == "attention_layer"]),
        (
            "steps with a gap, trust B or C",
            [p for p in report.times if p.trust in ("B", "C") and not p.assumed and p.kind != "attention_layer"],
        ),
        ("software that is not described: its day's", [p for p in report.times if p.assumed]),
        ("memory", report.memory),
    ]
    for name, predictions in kinds:
        if predictions:
            table.add_row(name, *_line(summarise(predictions)))
    console.print(table)
    if report.headline:
        mean, p95 = source_means(report.headline)
        console.print(f"trust A, averaged a source first: mean {_percent(mean)}, 95th percentile {_percent(p95)}")
        held = ", ".join(f"{_percent(covered(way))} {what}" for way, what in HELD.items())
        console.print(f"error bars made without a source hold of its rows: {held}")
    if report.verdicts:
        console.print(f"runs out of memory that are predicted to be: {_percent(report.right_verdicts())}")
    console.print(f"{len(report.skipped)} rows are not predicted; --rows shows which, and why")


def _print_choices(console: Console, report: ValidationReport) -> None:
    console.print()
    numbers = ("plans", "Spearman", "chosen plan loses")
    table = plain_table("plans of one job", *numbers, right=numbers, breaks=("plans",))
    for choice in report.choices:
        table.add_row(choice.name, str(choice.plans), f"{choice.spearman:.2f}", _percent(choice.regret))
    spearman = sum(c.spearman for c in report.choices) / len(report.choices)
    regret = sum(c.regret for c in report.choices) / len(report.choices)
    table.add_row("mean", "", f"{spearman:.2f}", _percent(regret))
    console.print(table)


# -- fitting ----------------------------------------------------------------------------------------------------------


def _fits(rows: Sequence[Path], *, silent: bool) -> list[fit.Fit]:
    cases = []
    for row in (row for path in rows or (validate.ROWS,) for row in read(path)):
        if row["kind"] in ("training_step", "layer") and (row.get("trust") or "") in TRUSTED:
            try:
                cases.append(case_of(row))
            except Unpredictable:
                continue
    with progress("fitting", fit.fit_count(cases), silent=silent) as begin:
        return fit.refit(cases, begin)


def _print_fit(console: Console, found: fit.Fit) -> None:
    console.print()
    columns = ("now", "fitted", "range", "in the cluster file")
    table = plain_table(f"{found.kind}: constant", *columns, right=NUMBERS, breaks=("in the cluster file",))
    for constant in found.constants:
        span = f"{constant.low:g} to {constant.high:g}"
        now, value = found.before[constant.name], found.after[constant.name]
        table.add_row(constant.name, f"{now:.4g}", f"{value:.4g}", span, ", ".join(constant.paths))
    console.print(table)
    console.print(
        f"loss {found.loss_before:.4f} now, {found.loss_after:.4f} fitted; rows of a source that the fit left out:"
    )
    columns = ("rows", "mean", "median", "95th", "worst", "bias")
    held = plain_table("source left out", *columns, right=NUMBERS, breaks=("rows",))
    if found.undescribed:
        held.add_row("all, each left out, its software too", *_line(summarise(found.undescribed)))
    for source, predictions in by_source(found.held_out).items():
        held.add_row(source[:SOURCE_WIDTH], *_line(summarise(predictions)))
    if found.held_out:
        held.add_row("all, each left out", *_line(summarise(found.held_out)))
    console.print(held)
