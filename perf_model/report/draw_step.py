"""Pictures of one step: a block, the lanes, the memory; drawn on a matplotlib figure that is given (torch-free).

Kinds differ by hatch as well as by colour. Spans may be predicted or measured (``trace.Span``).
"""

from __future__ import annotations

import bisect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...parallel.ir.collectives import FUSED
from ...parallel.ir.records import Phase
from ...parallel.ir.span import Span
from ..prices.played import PlayedStep
from . import trace
from .legend import columns, figure_of, is_narrow, legend_above
from .trace import COMPUTE, WAIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]
STYLES: dict[str, Style] = {
    "matmul": {"facecolor": "#6f9bc8"},
    "attention": {"facecolor": "#27496d"},
    "other compute": {"facecolor": "#d4d4d4"},
    "matmul, again": {"facecolor": "#6f9bc8", "hatch": "////"},
    "attention, again": {"facecolor": "#27496d", "hatch": "////"},
    "other compute, again": {"facecolor": "#d4d4d4", "hatch": "////"},
    "all_gather": {"facecolor": "#f2d388", "hatch": "\\\\\\"},
    "reduce_scatter": {"facecolor": "#cf7f5c", "hatch": "...."},
    "all_reduce": {"facecolor": "#9cc5a1", "hatch": "ooo"},
    "to_host": {"facecolor": "#c9b3d6", "hatch": "--"},
    "from_host": {"facecolor": "#7a4f7d", "hatch": "--"},
    "compute waits": {"facecolor": "#ffffff", "hatch": "xxxxx", "edgecolor": "#b00020"},
}
MEMORY: dict[str, tuple[str, str]] = {  # class: colour, hatch
    "CUDA context": ("#444444", "|||"),
    "NCCL": ("#8a8a8a", "OO"),
    "cuBLAS": ("#9d9d9d", "\\\\\\"),
    "CUDA graphs": ("#dddddd", "////"),
    "frozen encoders": ("#bdbdbd", "ooo"),
    "optimizer": ("#27496d", ""),
    "EMA": ("#6f9bc8", "|||"),
    "gradients": ("#a8c6e3", "---"),
    "weights": ("#d6e4f2", ""),
    "frozen weights": ("#9ec9d9", "..."),
    "gathered units": ("#f2d388", "xxx"),
    "unit gradients": ("#cf7f5c", "..."),
    "kept activations": ("#9cc5a1", "///"),
    "transients": ("#d7ead9", "\\\\\\"),
    "workspace": ("#7a4f7d", "+++"),
    "inputs": ("#ffffff", "---"),
}
GREY = "#555555"
CHARACTER_IN = 0.082  # width of a letter of a bar's label, inches
BESIDE_IN = 1.5  # of the width of a block's picture, left of its axes and right of them; less where it is narrow
NARROW_BESIDE_IN = 0.3
COMPUTE_ROWS, GAP_ROWS = 3.2, 0.25  # height of the lane of compute, and between lanes; of the others: 1
NARROW_COMPUTE_ROWS, NARROW_GAP_ROWS = 4.0, 0.65  # a lane's name stands above it
UPRIGHT = 13  # letters that stand in a narrow picture's lane of compute
STRIPS = 4  # a block's time in a narrow picture, as a text is broken into lines
LANE_COLUMNS = 14  # letters of a lane's name in a line
POINTS = 900  # pieces of time in the picture of memory
OUTSIDE = ("CUDA context", "NCCL", "cuBLAS", "CUDA graphs", "frozen encoders")  # live from before the step


def style_of(span: Span) -> str:
    """The key of ``STYLES`` by which a span is drawn."""
    if span.kind == WAIT:
        return "compute waits"
    if span.lane != COMPUTE:
        return FUSED.get(span.kind, span.kind)
    family = next((name for name in ("attention", "matmul") if name in span.kind), "other compute")
    return f"{family}, again" if span.clone else family


def _bar(style: str) -> Style:
    return {"edgecolor": "#303030", "linewidth": 0.4, **STYLES[style]}


def _legend(figure: Figure, drawn: Iterable[Axes]) -> None:
    """One entry for every style drawn."""
    handles: dict[str, Any] = {}
    for panel in drawn:
        handles.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    legend_above(figure, {style: handles[style] for style in STYLES if style in handles})


# -- time -------------------------------------------------------------------------------------------------------------


def draw_block(figure: Figure, spans: Sequence[Span], block: int) -> None:
    """Every record of one block, forward above backward, a lane below the other; times in ms from its first record."""
    spans = [*spans, *trace.waits(spans)]
    strips = STRIPS if is_narrow(figure) else 1
    directions = (Phase.FORWARD, Phase.BACKWARD)
    windows = [trace.block_window(spans, block, direction) for direction in directions]
    parts = [
        (begin + i * (end - begin) / strips, begin + (i + 1) * (end - begin) / strips)
        for begin, end in windows
        for i in range(strips)
    ]
    inside = [_within(spans, *part) for part in parts]
    rows = [NARROW_COMPUTE_ROWS + len(trace.lanes(some)) for some in inside]
    panels = figure.subplots(len(parts), 1, height_ratios=rows if is_narrow(figure) else None)
    for i, axes in enumerate(panels):
        _draw_lanes(axes, inside[i], windows[i // strips][0], parts[i])
    for i, (direction, (begin, end)) in enumerate(zip(directions, windows, strict=True)):
        panels[i * strips].set_title(f"{direction}: {(end - begin) * 1e3:.1f} ms", loc="left")
        panels[(i + 1) * strips - 1].set_xlabel("ms from the block's first record")
    _legend(figure, panels)


def _within(spans: Iterable[Span], begin: float, end: float) -> list[Span]:
    return [span for span in spans if span.end_s > begin and span.start_s < end]


def _draw_lanes(axes: Axes, spans: Sequence[Span], origin: float, window: tuple[float, float]) -> None:
    """Bars of one window, which ``spans`` are in, in ms from ``origin``."""
    begin, end = window
    names = trace.lanes(spans)
    narrow, width = is_narrow(figure_of(axes)), figure_of(axes).get_figwidth()
    compute, gap = (NARROW_COMPUTE_ROWS, NARROW_GAP_ROWS) if narrow else (COMPUTE_ROWS, GAP_ROWS)
    heights = [compute if name == COMPUTE else 1.0 for name in names]
    tops = [sum(heights[: i + 1]) + gap * i for i in range(len(names))]
    inches = (width - (NARROW_BESIDE_IN if narrow else BESIDE_IN)) / (end - begin)
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for span in spans:
        lane = names.index(span.lane)
        first, last = max(span.start_s, begin), min(span.end_s, end)
        groups.setdefault((style_of(span), lane), []).append(((first - origin) * 1e3, (last - first) * 1e3))
        room = (last - first) * inches
        text = next((text for text in _labels(span) if room >= len(text) * CHARACTER_IN), "")
        upright = not text and lane == 0
        text = text or span.label
        most = UPRIGHT if narrow and upright else 60
        if span.kind == WAIT or room < 0.13 or (not upright and room < len(text) * CHARACTER_IN) or len(text) > most:
            continue
        dark = "attention" in style_of(span)
        box = None if STYLES[style_of(span)].get("hatch") is None else {"facecolor": "white", "pad": 0.6, "lw": 0}
        axes.text(
            ((first + last) / 2 - origin) * 1e3,
            tops[lane] - heights[lane] / 2,
            text,
            rotation=90 if upright else 0,
            color="white" if dark and box is None else "black",
            bbox=box,
            ha="center",
            va="center",
        )
    for (style, lane), bars in groups.items():
        axes.broken_barh(bars, (tops[lane] - heights[lane], heights[lane]), label=style, **_bar(style))
    if narrow:
        for name, top, height in zip(names, tops, heights, strict=True):
            axes.text((begin - origin) * 1e3, top - height - 0.05, name, va="bottom")
        axes.set_yticks([])
    else:
        axes.set_yticks([top - height / 2 for top, height in zip(tops, heights, strict=True)], map(_lane_label, names))
    axes.set_ylim(tops[-1] + 0.15, -gap if narrow else -0.15)
    axes.set_xlim((begin - origin) * 1e3, (end - origin) * 1e3)


def _labels(span: Span) -> Iterator[str]:
    """What a bar may be called, the longest first."""
    if span.lane == COMPUTE:
        yield f"{span.kind}: {span.label}"
    elif span.place.block is not None:
        yield f"{span.kind}: {span.label} of block {span.place.block}"
        yield f"{span.label} of block {span.place.block}"
    yield span.label


def _lane_label(lane: str) -> str:
    """A lane's name in short lines: axes stay together where they fit."""
    lines = [""]
    for part in lane.replace(":", "*:").split("*"):
        if part.startswith(":") or len(lines[-1]) + len(part) > LANE_COLUMNS:
            lines.append(part.lstrip(":"))
        else:
            lines[-1] += part if not lines[-1] else f"*{part}"
    return "\n".join(line for line in lines if line)


def draw_step(figure: Figure, spans: Sequence[Span], step_s: float) -> None:
    """How busy every lane is over the step: the share of time in which it works, block by block."""
    names = trace.lanes(spans)
    panels = figure.subplots(len(names) + 1, 1, sharex=True, height_ratios=[0.5, *[1.0] * len(names)])
    _phases(panels[0], spans)
    edges = [0.0, *trace.block_starts(spans), step_s]
    waits = trace.waits(spans)
    for axes, lane in zip(panels[1:], names, strict=True):
        own = [span for span in (*spans, *waits) if span.lane == lane]
        base = [0.0] * (len(edges) - 1)
        for style in STYLES:
            of_style = [span for span in own if style_of(span) == style]
            if not of_style:
                continue
            share = _shares(of_style, edges)
            top = [a + b for a, b in zip(base, share, strict=True)]
            kind = _bar(style) | {"linewidth": 0.0}
            axes.fill_between(edges, [*base, base[-1]], [*top, top[-1]], step="post", label=style, **kind)
            base = top
        busy = sum(span.end_s - span.start_s for span in own if span.kind != WAIT)
        waited = sum(span.waited_s for span in own) if lane != COMPUTE else sum(w.end_s - w.start_s for w in waits)
        verb = "waits" if lane == COMPUTE else "exposed"
        axes.set_ylim(0.0, 1.02)
        axes.set_yticks([0.0, 1.0] if is_narrow(figure) else [0.0, 0.5, 1.0])
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        told = f"busy {_time(busy)} ({busy / step_s:.0%})", f"{verb} {_time(waited)} ({waited / step_s:.1%})"
        if is_narrow(figure):
            axes.set_title(f"{lane}\n{', '.join(told)}", loc="left")
        else:
            axes.set_ylabel(_lane_label(lane), rotation=0, ha="right", va="center")
            axes.text(1.005, 0.5, "\n".join(told), transform=axes.transAxes, va="center")
    panels[-1].set_xlabel("seconds from the start of the step")
    panels[-1].set_xlim(0.0, step_s)
    _legend(figure, panels)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def _shares(spans: Iterable[Span], edges: Sequence[float]) -> list[float]:
    """Share of every piece of time that the spans cover; spans of a lane do not overlap."""
    shares = [0.0] * (len(edges) - 1)
    for span in spans:
        first = max(bisect.bisect_right(edges, span.start_s) - 1, 0)
        for i in range(first, min(bisect.bisect_left(edges, span.end_s), len(shares))):
            begin, end = edges[i], edges[i + 1]
            if end > begin:
                shares[i] += max(min(span.end_s, end) - max(span.start_s, begin), 0.0) / (end - begin)
    return shares


def _phases(axes: Axes, spans: Sequence[Span]) -> None:
    """A strip that names forward, backward and optimizer of every micro-batch, as far as there is room."""
    figure = figure_of(axes)
    found: dict[tuple[Phase, int | None], list[float]] = {}
    for span in spans:
        place = span.place
        if span.lane == COMPUTE and place.phase in (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE) and not span.clone:
            ends = found.setdefault((place.phase, place.micro_batch), [span.start_s, span.end_s])
            ends[1] = max(ends[1], span.end_s)
    several = any(micro_batch for _, micro_batch in found)
    last = max(end for _, end in found.values())
    for i, ((phase, micro_batch), (begin, end)) in enumerate(found.items()):
        axes.broken_barh([(begin, end - begin)], (0.0, 1.0), facecolor=("#ffffff", "#e4e4e4")[i % 2], edgecolor=GREY)
        text = "optimizer" if phase is Phase.UPDATE else f"{phase} {micro_batch}" if several else str(phase)
        short = end - begin < 0.06 * last
        if is_narrow(figure) and (end - begin) / last * figure.get_figwidth() < len(text) * CHARACTER_IN:
            continue
        axes.text(end if short else (begin + end) / 2, 0.5, text, ha="left" if short else "center", va="center")
    axes.set_ylim(0.0, 1.0)
    axes.axis("off")


def draw_memory(figure: Figure, whole: PlayedStep) -> None:
    """Live bytes of one rank over the step, stacked by class, below what the device offers."""
    stacked = whole.stack
    points = trace.highest(whole, stacked, POINTS)
    times = [seconds for _, seconds in points] + [whole.timeline.step_s]
    constant = {name: value for name, value in whole.footprint.by_class.items() if name in OUTSIDE}
    series = {name: [value] * len(points) for name, value in constant.items()}
    series |= {name: [values[i] for i, _ in points] for name, values in stacked.by_class.items()}
    axes = figure.subplots()
    base = [0.0] * len(times)
    for name in sorted(series, key=lambda name: [*MEMORY, name].index(name)):
        colour, hatch = MEMORY.get(name, ("#ffffff", "|||"))
        values = [value / 1e9 for value in series[name]]
        top = [a + b for a, b in zip(base, [*values, values[-1]], strict=True)]
        label = f"{name}: {max(values):.1f} GB"
        kind: Style = {"facecolor": colour, "hatch": hatch, "edgecolor": "#303030", "linewidth": 0.2}
        axes.fill_between(times, base, top, step="post", label=label, **kind)
        base = top
    limit, peak = whole.footprint.limit_bytes / 1e9, whole.footprint.peak_bytes / 1e9
    axes.axhline(limit, color="#b00020", linestyle="--", linewidth=1.4)
    axes.text(times[-1], 1.01 * limit, f"usable: {limit:.1f} GB ", ha="right", va="bottom", color="#b00020")
    at = max(range(len(points)), key=base.__getitem__)
    axes.annotate(
        f"peak {peak:.1f} GB" if is_narrow(figure) else f"peak {peak:.1f} GB at {whole.footprint.peak_op}",
        (times[at], base[at]),
        xytext=(0, 26),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-|>", "facecolor": "black"},
        ha="left" if times[at] < 0.5 * times[-1] else "right",
        bbox={"facecolor": "white", "edgecolor": GREY, "pad": 2},
    )
    axes.set_xlim(0.0, times[-1])
    axes.set_ylim(0.0, (1.4 if is_narrow(figure) else 1.15) * max(limit, peak))
    axes.set_xlabel("seconds from the start of the step")
    axes.set_ylabel("GB")
    handles, labels = axes.get_legend_handles_labels()
    if is_narrow(figure):
        told = f"peak at {whole.footprint.peak_op}; in the legend, the most of each class"
        axes.set_title(textwrap.fill(told, columns(figure.get_figwidth() - 0.6)), loc="left")
        legend_above(figure, dict(zip(labels[::-1], handles[::-1], strict=True)))
    else:
        axes.legend(
            handles[::-1],
            labels[::-1],
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            title="most of each class",
        )
