"""Pictures of many plans: side by side, over batches, over GPUs; on a matplotlib figure that is given (torch-free).

Plans differ by marker as well as by colour.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...parallel.ir.plan import Plan
from ..prices.played import PlayedStep
from ..search.request import PricedPlan
from .explain import describe, terms
from .landscape import Landscape, NeutralGroup, Point
from .legend import columns, figure_of, is_narrow, legend_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#555555"
TERMS = (  # colour and hatch
    ("#27496d", ""),
    ("#6f9bc8", "///"),
    ("#f2d388", "\\\\\\"),
    ("#cf7f5c", "..."),
    ("#9cc5a1", "xxx"),
    ("#ffffff", "ooo"),
    ("#bdbdbd", "---"),
)
REST = "all others"
MARKERS = {1: "o", 2: "s", 4: "D", 8: "^", 16: "v"}  # by tp
SHADES = {1: "#ffffff", 2: "#cfe6d2", 4: "#6f9bc8", 8: "#27496d"}  # by cp, up to the next
LABEL_COLUMNS = 36  # letters in a line of a plan beside its bar
LABELLED = 8  # plans of the landscape that carry their degrees
AXES_SHARE = 0.8  # of a figure's width, by its axes
TICK_IN, LABEL_IN = 0.24, 0.8  # from one slanting number, and from one plan's degrees, to the next


def draw_terms(figure: Figure, wholes: Sequence[PlayedStep]) -> None:
    """Where the time of one sample goes under several plans: GPU-seconds by term, the cheapest plan on top."""
    axes = figure.subplots()
    rows = [_gpu_seconds(whole) for whole in wholes]
    names = sorted({name for row in rows for name in row}, key=lambda name: -max(row.get(name, 0.0) for row in rows))
    if len(names) > len(TERMS):  # the least become one
        least, names = names[len(TERMS) - 1 :], [*names[: len(TERMS) - 1], REST]
        for row in rows:
            row[REST] = sum(row.get(name, 0.0) for name in least)
    left = [0.0] * len(rows)
    for name, (colour, hatch) in zip(names, TERMS, strict=False):
        values = [max(row.get(name, 0.0), 0.0) for row in rows]
        axes.barh(
            range(len(rows)),
            values,
            left=left,
            height=0.36 if is_narrow(figure) else 0.62,
            label=name,
            facecolor=colour,
            hatch=hatch,
            edgecolor="#303030",
            linewidth=0.4,
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    narrow, across = is_narrow(figure), columns(figure.get_figwidth() - 0.3)
    for i, (whole, total) in enumerate(zip(wholes, left, strict=True)):
        text = f"{total:,.0f} GPU-s a sample; step {whole.step_s:.2f} s, batch {whole.samples:,}"
        if narrow:
            _above(axes, i, f"{_label(i + 1, whole.plan, across)}\n{text}")
        else:
            axes.text(total, i, f" {text}", va="center")
    names = [] if narrow else [_label(i + 1, whole.plan, LABEL_COLUMNS) for i, whole in enumerate(wholes)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(rows) - (0.7 if narrow else 0.5), -1.0 if narrow else -0.5)
    axes.set_xlim(0.0, (1.02 if narrow else 1.5) * max(left))
    axes.set_xlabel("GPU-seconds of one sample")
    handles, labels = axes.get_legend_handles_labels()
    legend_above(figure, dict(zip(labels, handles, strict=True)))


def _above(axes: Axes, row: int, text: str) -> None:
    """A row's name above it, where there is no room on its left."""
    axes.annotate(text, (0.0, row - 0.2), xytext=(4, 0), textcoords="offset points", va="bottom")


def _gpu_seconds(whole: PlayedStep) -> dict[str, float]:
    """The terms of a step for one sample."""
    each = whole.gpu_s_per_sample / whole.step_s
    return {name: seconds * each for name, seconds in terms(whole).items()}


def _label(rank: int, plan: Plan, letters: int) -> str:
    return textwrap.fill(f"{rank}: {describe(plan)}", letters, break_on_hyphens=False)


def degrees(plan: Plan) -> tuple[str, str]:
    """``tp2 cp6``, and ``16 x 32``: the shard group and its replicas."""
    return f"tp{plan.tp} cp{plan.cp}", f"{plan.dp_shard} x {plan.dp_replicate}"


# -- over batches -----------------------------------------------------------------------------------------------------


def draw_landscape(figure: Figure, found: Landscape, best: PricedPlan) -> None:
    """Throughput against global batch, with neutral groups; below, which families fit into memory at which batch."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.1, 1.0])
    misfits = {refusal.family.global_batch(found.gpus) for refusal in found.misfits}
    batches = sorted({c.global_batch for c in found.choices} | misfits)
    doublings_per_in = math.log2(batches[-1] / batches[0] * 1.35**2) / (AXES_SHARE * figure.get_figwidth())
    _draw_throughput(upper, found, best, doublings_per_in)
    _draw_feasible(lower, found)
    for axes in (upper, lower):
        if is_narrow(figure):
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.01), ncols=2, frameon=False, borderaxespad=0.0)
        else:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    lower.set_xscale("log", base=2)
    ticks = _apart(batches, TICK_IN * doublings_per_in)
    lower.set_xticks(ticks, [f"{b:,}" for b in ticks], rotation=45, ha="right")
    lower.minorticks_off()
    lower.set_xlim(batches[0] / 1.35, batches[-1] * 1.35)
    lower.set_xlabel("global batch (samples)")


def _apart(batches: Sequence[int], doublings: float) -> list[int]:
    """The batches, in their order, that stand so far from all those before them."""
    kept: list[int] = []
    for batch in batches:
        if all(abs(math.log2(batch / other)) >= doublings for other in kept):
            kept.append(batch)
    return kept


def _draw_throughput(axes: Axes, found: Landscape, best: PricedPlan, doublings_per_in: float) -> None:
    for i, group in enumerate(found.groups):
        _draw_group(axes, group, i, found.error)
    for choice in found.choices:
        axes.plot(
            [choice.global_batch],
            [choice.samples_per_s],
            marker=MARKERS.get(choice.plan.tp, "P"),
            markerfacecolor=SHADES[_cp_class(choice.plan.cp)],
            markeredgecolor="black",
            markersize=7,
            linestyle="none",
        )
    axes.plot(
        [best.global_batch],
        [best.samples_per_s],
        marker="o",
        markersize=16,
        markerfacecolor="none",
        markeredgecolor="#b00020",
        linestyle="none",
        label="the plan chosen",
    )
    fastest = sorted(found.frontier(), key=lambda c: -c.samples_per_s)[:LABELLED]
    labelled = _apart([choice.global_batch for choice in fastest], LABEL_IN * doublings_per_in)
    for choice in (choice for choice in fastest if choice.global_batch in labelled):
        axes.annotate(
            f"tp{choice.plan.tp} cp{choice.plan.cp}\n{choice.step_s:.1f} s",
            (choice.global_batch, choice.samples_per_s),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 0.8, "linewidth": 0},
        )
    kinds: dict[str, Any] = {"marker": "s", "linestyle": "none", "color": "none", "markeredgecolor": "black"}
    for tp in sorted({c.plan.tp for c in found.choices}):
        kinds["marker"] = MARKERS.get(tp, "P")
        axes.plot([], [], **kinds, label=f"tp {tp}")
    kinds["marker"] = "s"
    for cp in sorted({_cp_class(c.plan.cp) for c in found.choices}):
        follow = [known for known in SHADES if known > cp]
        text = f"cp {cp}" + (
            "" if follow and follow[0] == cp + 1 else f" to {follow[0] - 1}" if follow else " and more"
        )
        axes.plot([], [], **kinds, markerfacecolor=SHADES[cp], label=text)
    axes.set_ylabel("samples/s")
    rates = [choice.samples_per_s for choice in found.choices]
    axes.set_ylim(0.92 * min(rates), 1.08 * max(rates))
    axes.grid(True, color="#dddddd", linewidth=0.5)


def _cp_class(cp: int) -> int:
    return max(known for known in SHADES if known <= cp)


def _draw_group(axes: Axes, group: NeutralGroup, number: int, error: float) -> None:
    """A band of the throughputs that the model cannot tell from the fastest plan's of a neutral group."""
    fastest = group.choices[0].samples_per_s
    batches = group.batches
    shortest, longest = group.step_s
    axes.fill_between(
        [batches[0] / 1.12, batches[-1] * 1.12],
        (1.0 - error) * fastest,
        fastest,
        facecolor="#eeeeee",
        hatch=("///", "\\\\\\", "...", "xxx")[number % 4],
        edgecolor="#999999",
        linewidth=0.8,
        label=f"neutral {number + 1}: batch {batches[0]:,}\nto {batches[-1]:,}, {shortest:.1f} to {longest:.1f} s",
    )


def _draw_feasible(axes: Axes, found: Landscape) -> None:
    """One row for each size of a model-parallel group (tp * cp): circles fit, crosses do not, with what they need."""
    narrow = is_narrow(figure_of(axes))
    need: dict[tuple[int, int], float] = {}
    free = ""
    for misfit in found.misfits:
        cell = misfit.family.global_batch(found.gpus), misfit.family.model_parallel
        need[cell] = min(need.get(cell, math.inf), misfit.needs_bytes)
        free = f"\n({misfit.free_bytes / 1e9:.1f} GB are free)"
    fits = {(c.global_batch, c.plan.tp * c.plan.cp) for c in found.choices}
    rows = sorted({size for _, size in (*need, *fits)})
    place = {size: i for i, size in enumerate(rows)}
    axes.plot(
        [batch for batch, _ in fits],
        [place[size] for _, size in fits],
        marker="o",
        linestyle="none",
        markerfacecolor="white",
        markeredgecolor="black",
        label="fits",
    )
    crossed = {cell: bytes_ for cell, bytes_ in need.items() if cell not in fits}
    axes.plot(
        [batch for batch, _ in crossed],
        [place[size] for _, size in crossed],
        marker="x",
        linestyle="none",
        color="#b00020",
        markeredgewidth=1.8,
        label=f"does not fit:\nGB that it needs{free}",
    )
    for (batch, size), bytes_ in crossed.items():
        axes.annotate(
            f"{bytes_ / 1e9:.1f}",
            (batch, place[size]),
            xytext=(0, 5) if narrow else (6, 0),
            textcoords="offset points",
            rotation=90 if narrow else 0,
            ha="center" if narrow else "left",
            va="bottom" if narrow else "center",
        )
    axes.set_yticks(range(len(rows)), [str(size) for size in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_ylabel("tp * cp")
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.5)


# -- over GPUs --------------------------------------------------------------------------------------------------------


def draw_scaling(figure: Figure, points: Sequence[Point]) -> None:
    """MFU, and samples/s of 1,000 GPUs, of the best plan at every number of GPUs; in a narrow picture a row each."""
    if is_narrow(figure):
        _draw_rows(figure.subplots(), points)
    else:
        _draw_curve(figure.subplots(), points)


def _draw_rows(axes: Axes, points: Sequence[Point]) -> None:
    most = max((point.mfu for point in points), default=0.0) or 1.0
    for row, point in enumerate(points):
        if point.choice is None:
            axes.plot([0.0], [row], marker="x", color="#b00020", markersize=9, clip_on=False)
            told = "no plan fits"
        else:
            axes.plot([100.0 * point.mfu], [row], marker="o", color="black", markerfacecolor="white")
            told = f"{', '.join(degrees(point.choice.plan))}; {point.choice.step_s:.1f} s"
        _above(axes, row, told)
    axes.set_yticks(range(len(points)), [f"{point.gpus:,}" for point in points])
    axes.set_ylim(len(points) - 0.5, -1.0)
    axes.set_xlim(0.0, 108.0 * most)
    axes.set_ylabel("GPUs")
    axes.set_xlabel("MFU (%)")
    axes.grid(True, color="#dddddd", linewidth=0.5)
    if first := next((point for point in points if point.choice), None):
        above = axes.twiny()  # the same points: throughput is MFU times a constant
        above.set_xlim(0.0, axes.get_xlim()[1] * 10.0 * first.samples_per_gpu_s / first.mfu)
        above.set_xlabel("samples/s of 1,000 GPUs")
        above.spines["top"].set_visible(True)


def _draw_curve(axes: Axes, points: Sequence[Point]) -> None:
    runs = [(point, point.choice) for point in points if point.choice is not None]
    axes.plot(
        [point.gpus for point, _ in runs],
        [100.0 * point.mfu for point, _ in runs],
        marker="o",
        color="black",
        markerfacecolor="white",
        label="best plan",
    )
    for i, (point, choice) in enumerate(runs):
        beside = [runs[j][0].mfu for j in (i - 1, i + 1) if 0 <= j < len(runs)]
        above = point.mfu >= sum(beside, start=point.mfu) / (len(beside) + 1)  # where the line is not
        axes.annotate(
            "\n".join((*degrees(choice.plan), f"{choice.step_s:.1f} s")),
            (point.gpus, 100.0 * point.mfu),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
        )
    for point in points:
        if point.choice is None:
            axes.plot([point.gpus], [0.0], marker="x", color="#b00020", markersize=9, clip_on=False)
            axes.annotate(
                "no plan fits",
                (point.gpus, 0.0),
                xytext=(0, 9),
                textcoords="offset points",
                rotation=90,
                ha="center",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([p.gpus for p in points], [f"{p.gpus:,}" for p in points], rotation=45, ha="right")
    axes.minorticks_off()
    axes.set_xlim(points[0].gpus / 1.4, points[-1].gpus * 1.4)
    axes.set_ylim(0.0, 130.0 * max((point.mfu for point, _ in runs), default=1.0))
    axes.set_xlabel("GPUs")
    axes.set_ylabel("MFU (%)")
    axes.grid(True, color="#dddddd", linewidth=0.5)
    if runs:
        point = runs[-1][0]
        right = axes.twinx()  # the same points: throughput is MFU times a constant
        right.set_ylim(0.0, axes.get_ylim()[1] * 10.0 * point.samples_per_gpu_s / point.mfu)
        right.set_ylabel("samples/s of 1,000 GPUs")
        right.spines["right"].set_visible(True)
