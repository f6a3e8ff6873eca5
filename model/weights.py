"""Weights by name: initial values, and the way between full tensors and a rank's flat shard.

Initial values are functions of (seed, parameter name, element), so that any plan starts from identical weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.philox import Purpose, normal
from ..parallel.ir.units import Parameter, Slot, Units

_CHUNK = 1 << 16  # elements drawn at once: bounds the 64-bit temporaries

Values = Callable[[Parameter, Tensor], Tensor]
"""(parameter, int64 C-order indices in its global shape) -> values."""


def initial_values(seed: int) -> Values:
    """``normal`` parameters ~ N(0, std**2); the counter's sample word is a hash of the name."""

    def values(parameter: Parameter, element: Tensor) -> Tensor:
        if parameter.init != "normal":
            return torch.full(element.shape, float(parameter.init == "ones"), dtype=torch.float64)
        return parameter.std * _drawn(seed, Purpose.INIT, parameter.name, element)

    return values


def probe_values(seed: int) -> Values:
    """As :func:`initial_values`, but nothing is zero or one: zero gates would hide every gradient behind them.

    Zero-initialised parameters and tables get noise of std 0.2, gains 1 + 0.2 noise.
    """
    initial = initial_values(seed)

    def values(parameter: Parameter, element: Tensor) -> Tensor:
        if parameter.init == "normal" and not parameter.name.startswith("position."):
            return initial(parameter, element)
        return (parameter.init == "ones") + 0.2 * _drawn(seed, Purpose.PROBE, parameter.name, element)

    return values


def _drawn(seed: int, purpose: Purpose, name: str, element: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return normal(seed, purpose, zero, zero + zlib.crc32(name.encode()), element)


def full(parameters: tuple[Parameter, ...], values: Values, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole tensors by name, on one process."""
    weights: dict[str, Tensor] = {}
    for parameter in parameters:
        flat = torch.empty(parameter.elements, dtype=dtype)
        for start in range(0, parameter.elements, _CHUNK):
            stop = min(start + _CHUNK, parameter.elements)
            flat[start:stop] = values(parameter, torch.arange(start, stop)).to(dtype)
        weights[parameter.name] = flat.view(parameter.shape)
    return weights


def global_elements(parameter: Parameter, tp: int, tp_index: int, start: int, stop: int) -> Tensor:
    """C-order indices in the global shape of elements ``start`` to ``stop`` of one tp rank's part."""
    element = torch.arange(start, stop)
    if parameter.tp_dim is None or tp == 1:
        return element
    inner = 1
    for size in parameter.shape[parameter.tp_dim + 1 :]:
        inner *= size
    extent = parameter.shape[parameter.tp_dim]
    local = extent // tp
    outer, rest = element // (local * inner), element % (local * inner)
    return outer * (extent * inner) + tp_index * local * inner + rest


def fill_shard(flat: Tensor, units: Units, coordinates: dict[str, int], values: Values) -> None:
    """Fill a rank's flat shard; padding becomes zero."""
    flat = flat.view(-1).zero_()
    for slot, start, stop, position in held_parts(units, coordinates):
        for first in range(start, stop, _CHUNK):
            last = min(first + _CHUNK, stop)
            element = global_elements(slot.parameter, units.plan.tp, coordinates["tp"], first, last)
            where = position + first - start
            flat[where : where + last - first] = values(slot.parameter, element).to(flat.dtype)


def held_parts(units: Units, coordinates: dict[str, int]) -> list[tuple[Slot, int, int, int]]:
    """Every (slot, start, stop, position) of a rank: see ``Unit.overlaps``."""
    return [part for unit in units.units for part in unit.overlaps(units.shard_index(unit, coordinates))]


def collect(shards: list[tuple[dict[str, int], Tensor]], units: Units) -> dict[str, Tensor]:
    """Full tensors from the flat shards of all ranks of one replica, given as (coordinates, flat shard)."""
    weights = {
        slot.parameter.name: torch.zeros(slot.parameter.elements, dtype=shards[0][1].dtype)
        for unit in units.units
        for slot in unit.slots
    }
    for coordinates, flat in shards:
        flat = flat.view(-1)
        for slot, start, stop, position in held_parts(units, coordinates):
            element = global_elements(slot.parameter, units.plan.tp, coordinates["tp"], start, stop)
            weights[slot.parameter.name][element] = flat[position : position + stop - start]
    shapes = {slot.parameter.name: slot.parameter.shape for unit in units.units for slot in unit.slots}
    return {name: value.view(shapes[name]) for name, value in weights.items()}
