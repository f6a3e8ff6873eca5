"""The picture of a waterfall, from the chip's peak to the MFU; on a matplotlib figure that is given (torch-free).

Kinds of losses differ by hatch as well as by colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .legend import is_narrow, legend_above
from .waterfall import Loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: dict[str, tuple[str, str]] = {  # colour, hatch
    "work": ("#9cc5a1", "///"),
    "chip": ("#cf7f5c", "..."),
    "kernels": ("#6f9bc8", ""),
    "communication": ("#f2d388", "\\\\\\"),
    "job": ("#bdbdbd", "xxx"),
}
WHOLE = "#27496d"  # of the peak and of what is left of it
BESIDE = 0.01  # of the axis, between a bar and what is told of it
NARROW_HEIGHT, HEIGHT = 0.4, 0.66  # of a bar, in rows


def draw_waterfall(figure: Figure, losses: Sequence[Loss], mfu: float) -> None:
    """A row for the peak, for every loss and for the MFU that is left; ``losses``: their shares and it are one."""
    axes, narrow = figure.subplots(), is_narrow(figure)
    height = NARROW_HEIGHT if narrow else HEIGHT
    names = ["the chip's peak", *(loss.name for loss in losses), "MFU"]
    bars, at = [(0.0, 1.0)], 1.0
    for loss in losses:
        at -= loss.share
        bars.append((at, loss.share))
    kinds = ["", *(loss.kind for loss in losses), ""]
    texts = ["100%", *(f"{loss.share:.1%}, {_time(loss.seconds)}" for loss in losses), f"{mfu:.1%}"]
    for row, ((left, width), kind) in enumerate(zip([*bars, (0.0, mfu)], kinds, strict=True)):
        colour, hatch = KINDS.get(kind, (WHOLE, ""))
        look = {"facecolor": colour, "hatch": hatch, "edgecolor": "#303030", "linewidth": 0.4}
        axes.barh(row, width, left=left, height=height, label=kind or None, **look)
    for row, ((left, width), text) in enumerate(zip([*bars, (0.0, mfu)], texts, strict=True)):
        if narrow:
            told = f"{names[row]}: {text}"
            axes.annotate(told, (0.0, row - 0.24), xytext=(4, 0), textcoords="offset points", va="bottom")
            continue
        begin, end = min(left, left + width), max(left, left + width)
        beside = end + BESIDE if end < 0.8 else begin - BESIDE
        if row == 0:
            axes.text(0.5, row, text, ha="center", va="center", color="white")
        else:
            axes.text(beside, row, text, ha="left" if beside > end else "right", va="center")
    axes.set_yticks([] if narrow else range(len(names)), [] if narrow else names)
    axes.set_ylim(len(names) - 0.5, -0.9 if narrow else -0.6)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the step; what is left is the MFU")
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.5)
    handles, labels = axes.get_legend_handles_labels()
    legend_above(figure, {kind: handles[labels.index(kind)] for kind in KINDS if kind in labels})


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if abs(seconds) >= 0.1 else f"{seconds * 1e3:.2g} ms"
