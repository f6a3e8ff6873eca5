"""Grids: values at lattice points, read from small CSVs and interpolated (torch-free)."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...errors import CinemeshError


@dataclass(frozen=True)
class Grid:
    """Values at points of a lattice, interpolated linearly in the logarithms of the coordinates, constant outside.

    A lattice point without a value takes no part.
    """

    axes: tuple[tuple[float, ...], ...]  # logarithms, ascending
    values: dict[tuple[int, ...], float]

    @classmethod
    def of(cls, points: Sequence[tuple[tuple[float, ...], float]]) -> Grid:
        axes = tuple(tuple(sorted({math.log(point[i]) for point, _ in points})) for i in range(len(points[0][0])))
        at = [{value: i for i, value in enumerate(axis)} for axis in axes]
        return cls(axes, {tuple(at[i][math.log(x)] for i, x in enumerate(point)): value for point, value in points})

    def at(self, *point: float) -> float:
        """The value at a point, linear in the logarithms; outside of the grid that of its edge."""
        corners: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for axis, coordinate in zip(self.axes, point, strict=True):
            x = math.log(coordinate)
            if x <= axis[0]:
                near = ((0, 1.0),)
            elif x >= axis[-1]:
                near = ((len(axis) - 1, 1.0),)
            else:
                low = bisect_right(axis, x) - 1
                share = (x - axis[low]) / (axis[low + 1] - axis[low])
                near = ((low, 1.0 - share), (low + 1, share)) if share else ((low, 1.0),)
            corners = [((*index, i), weight * w) for index, weight in corners for i, w in near]
        total = weighed = 0.0
        for index, weight in corners:
            if index in self.values:
                weighed += weight
                total += weight * self.values[index]
        return total / weighed if weighed else 1.0


@lru_cache(maxsize=16)
def read_grid(path: str) -> Grid:
    """A grid from a CSV: the last column is the value, the others are coordinates; ``#`` begins a comment line."""
    rows = _rows(path)
    return Grid.of([(tuple(float(x) for x in row[:-1]), float(row[-1])) for row in rows])


@lru_cache(maxsize=16)
def read_grids(path: str) -> dict[str, Grid]:
    """As ``read_grid``, one grid for each name in the first column."""
    named: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for name, *rest in _rows(path):
        named.setdefault(name, []).append((tuple(float(x) for x in rest[:-1]), float(rest[-1])))
    return {name: Grid.of(points) for name, points in named.items()}


def _rows(path: str) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [line for line in file if not line.startswith("#")]
    except OSError:
        raise CinemeshError(f"cluster: there is no grid {path}", remedy="put it beside the cluster file") from None
    return list(csv.reader(lines))[1:]
