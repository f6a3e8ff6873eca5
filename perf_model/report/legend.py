"""What the width of a picture asks for, a legend above it in as many rows as it needs among it (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_IN = 0.21  # height of a row
LETTER_IN = 0.078  # width of a letter at the size of the text, generous
KEY_IN = 0.55  # width of an entry's key and of the gaps beside it
NARROW_IN = 6.0  # a picture of less is for a phone: what stands beside axes goes above or below them


def figure_of(axes: Axes) -> Figure:
    """The whole picture that axes are in."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def is_narrow(figure: Figure) -> bool:
    """Whether there is no room beside the axes."""
    return figure.get_figwidth() < NARROW_IN


def columns(width_in: float) -> int:
    """Letters of text that fit side by side."""
    return int(width_in / LETTER_IN)


def legend_above(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Entries by name above all axes, which make room for its rows and never for its width."""
    width, height = figure.get_size_inches()
    rows = -(-len(handles) // fitting(list(handles), width - 0.3))
    entries = -(-len(handles) // rows)  # in a row, as even as can be
    engine: Any = figure.get_layout_engine()
    left, bottom, across, up = engine.get()["rect"] if engine else (0.0, 0.0, 1.0, 1.0)
    top = bottom + up
    made = figure.legend(
        list(handles.values()),
        list(handles),
        loc="upper left",
        bbox_to_anchor=(0.05 / width, top),
        ncols=entries,
        frameon=False,
        borderaxespad=0.0,
    )
    made.set_in_layout(False)
    if engine:
        engine.set(rect=(left, bottom, across, up - (rows * ROW_IN + 0.12) / height))


def fitting(names: Sequence[str], width_in: float) -> int:
    """The most columns, filled one after the other, whose widest names stand side by side in a width."""
    for columns in range(len(names), 1, -1):
        rows = -(-len(names) // columns)
        filled = [names[i : i + rows] for i in range(0, len(names), rows)]
        if sum(KEY_IN + LETTER_IN * max(map(len, column)) for column in filled) <= width_in:
            return columns
    return 1
