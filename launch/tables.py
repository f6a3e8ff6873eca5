"""How the commands print tables and quantities: one way for all of them (torch-free)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions
from rich.text import Text

PIPED_WIDTH = 10_000  # columns where the output is no terminal: nothing is folded, so that lines can be searched
GAP = 2  # columns between two cells, and before what continues a row
NARROWEST = 12  # columns that a cell is folded to at most
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def new_console() -> Console:
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


class TextTable:
    """Columns of text. Where a row does not fit into the width, it goes on in a line below it from each of ``breaks``.

    Of a line that is still too wide, the widest left-aligned cells are folded. Cells may have several lines.
    """

    def __init__(self, columns: Sequence[str], right: Iterable[str], breaks: Iterable[str], header: bool) -> None:
        self._right = [column in set(right) for column in columns]
        self._rows: list[tuple[tuple[str, ...], str]] = [(tuple(columns), "bold")] if header else []
        starts = [0, *sorted({columns.index(column) for column in breaks} - {0}), len(columns)]
        self._broken = [range(a, b) for a, b in pairwise(starts)]

    def add_row(self, *cells: str, style: str = "") -> None:
        """One cell a column."""
        assert len(cells) == len(self._right), cells
        self._rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line, style in self._lines(options.max_width):
            yield Text(line, style=style, no_wrap=True, overflow="ignore")

    def _lines(self, width: int) -> Iterator[tuple[str, str]]:
        widths = [
            max((len(line) for cells, _ in self._rows for line in cells[i].split("\n")), default=0)
            for i in range(len(self._right))
        ]
        whole = range(len(widths))
        groups = [whole] if _width(widths, whole) <= width else self._broken
        words = [max((len(word) for cells, _ in self._rows for word in cells[i].split()), default=0) for i in whole]
        for number, group in enumerate(groups):
            room = width - (GAP if number else 0)
            left = [i for i in group if not self._right[i]]
            for floors in (words, [NARROWEST] * len(words)):  # words are cut only where that is not enough
                for i in sorted(left, key=lambda i: floors[i] - widths[i]):
                    excess = max(_width(widths, group) - room, 0)
                    widths[i] = max(widths[i] - excess, min(floors[i], widths[i]))
        for cells, style in self._rows:
            for number, group in enumerate(groups):
                if number and not any(cells[i] for i in group):
                    continue
                for line in self._row([(cells[i], widths[i], self._right[i]) for i in group]):
                    yield " " * (GAP if number else 0) + line, style

    def _row(self, cells: Sequence[tuple[str, int, bool]]) -> Iterator[str]:
        folded = [_fold(text, width) for text, width, _ in cells]
        for i in range(max(map(len, folded))):
            parts = [lines[i] if i < len(lines) else "" for lines in folded]
            aligned = (
                part.rjust(width) if right else part.ljust(width)
                for part, (_, width, right) in zip(parts, cells, strict=True)
            )
            yield (" " * GAP).join(aligned).rstrip()


def plain_table(*columns: str, right: Iterable[str] = (), breaks: Iterable[str] = (), header: bool = True) -> TextTable:
    """A table to print. ``right``: columns of numbers; ``breaks``: where a row that does not fit goes on below."""
    return TextTable(columns, right, breaks, header)


def _width(widths: Sequence[int], group: range) -> int:
    return sum(widths[i] for i in group) + GAP * (len(group) - 1)


def _fold(text: str, width: int) -> list[str]:
    lines = text.split("\n")
    return [part for line in lines for part in textwrap.wrap(line, max(width, 1), break_on_hyphens=False) or [""]]


def quantity(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1.39 TFLOP, 113 MB."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:
            return f"{_digits(value / scale)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
