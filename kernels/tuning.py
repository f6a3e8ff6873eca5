"""Tuning tables: which tiles a kernel runs with, by kernel, shape class and device (torch-free).

``tuning/DEVICE.yaml`` holds what is known of one device. Tiles that are not in a table are the kernel's own, reasoned
ones. ``cinemesh kernels --tune`` measures on the GPU at hand and rewrites its table, stating device and date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..documents import mapping, read_yaml, write_yaml
from ..errors import CinemeshError
from ..files import atomic_file

TABLES = Path(__file__).parent / "tuning"
REASONED = "reasoned, not measured"
DEFAULT_DEVICE = "h100"  # whose table serves a plan made where no GPU is


@dataclass(frozen=True)
class Table:
    """What is known of one device; ``origin`` says whether it was measured, on which card and when."""

    device: str
    origin: str
    tiles: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)  # kernel, shape class, tile
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # rate class -> share of the limit


def shape_class(**sizes: int) -> str:
    """Sizes that share their tiles: each is rounded up to a power of two. ``T=9216, D=6144`` -> ``D8192,T16384``."""
    return ",".join(f"{label}{1 << max(0, size - 1).bit_length()}" for label, size in sorted(sizes.items()))


def device_key(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``h100``: the name of the table's file."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    words = [word for word in words if word not in ("nvidia", "geforce", "tesla")]
    return words[0] if words else DEFAULT_DEVICE


@lru_cache(maxsize=8)
def table(device: str = DEFAULT_DEVICE) -> Table:
    """The table of a device, empty when there is none. Raises CinemeshError when its file is not a table."""
    path = path_of(device)
    if not path.exists():
        return Table(device, REASONED)
    remedy = "restore the file, or measure again: cinemesh kernels --tune"
    values = read_yaml(path, "the tuning table", remedy)
    keys = ("device", "origin", "tiles", "rates")
    values = mapping(values, f"tuning table {path.name}", keys, required=keys[:2])
    return Table(values["device"], values["origin"], values.get("tiles") or {}, values.get("rates") or {})


def tile(kernel: str, shape: str, default: Mapping[str, int], device: str = DEFAULT_DEVICE) -> dict[str, int]:
    """``default``, with what the device's table says about ``kernel`` at shape class ``shape`` in its place.

    Keys are the kernel's own tile constants, ``num_warps`` and ``num_stages``.
    """
    found = table(device).tiles.get(kernel, {}).get(shape, {})
    unknown = sorted(found.keys() - default.keys())
    if unknown:
        raise CinemeshError(
            f"tuning table of {device}: {kernel} at {shape} names {', '.join(unknown)}",
            remedy=f"this kernel has {', '.join(default)}. Measure again: cinemesh kernels --tune",
        )
    chosen = {**default, **found, **_trials.get((kernel, shape), {})}
    for asked_for in _observers:
        asked_for[kernel, shape] = chosen
    return chosen


_trials: dict[tuple[str, str], dict[str, int]] = {}
_observers: list[dict[tuple[str, str], dict[str, int]]] = []


@contextmanager
def asked() -> Iterator[dict[tuple[str, str], dict[str, int]]]:
    """A dictionary that fills with the tiles asked for inside: (kernel, shape class) -> tile."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    _observers.append(found)
    try:
        yield found
    finally:
        _observers.remove(found)


@contextmanager
def trial(kernel: str, shape: str, tried: dict[str, int]) -> Iterator[None]:
    """Inside, ``kernel`` at ``shape`` runs with this tile."""
    _trials[kernel, shape] = tried
    try:
        yield
    finally:
        del _trials[kernel, shape]


def path_of(key: str) -> Path:
    """Of the table that is read for a device."""
    return TABLES / f"{key}.yaml"


def write(found: Table, path: Path) -> None:
    """Write a table, or replace it in one move."""
    values: dict[str, Any] = {
        "device": found.device,
        "origin": found.origin,
        "tiles": {name: {shape: dict(best) for shape, best in rows.items()} for name, rows in found.tiles.items()},
        "rates": {name: dict(rows) for name, rows in found.rates.items()},
    }
    with atomic_file(path) as unfinished:
        unfinished.write_text(write_yaml(values), encoding="utf-8")
    table.cache_clear()
