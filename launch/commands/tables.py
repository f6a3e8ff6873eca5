"""How the commands print tables and quantities (torch-free)."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

WIDTH = 130  # columns, where the output is no terminal
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def new_console() -> Console:
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def plain_table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def quantity(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1.39 TFLOP, 113 MB."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:
            return f"{_digits(value / scale)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
