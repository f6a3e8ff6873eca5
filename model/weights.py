"""Weights by name: initial values, and the way between full tensors and a rank's flat shard.

Initial values are functions of (seed, parameter name, element), so that any plan starts from identical weights. They
are drawn on the device that holds them.

[Note: rounding] The words of a counter are integers, and u and 2 pi u are correctly rounded: the same on every device.
log, sin and cos are not. torch's CPU libraries and CUDA err by at most 1 unit in the last place, CUDA's sin and cos by
2. Of n = std sqrt(-2 log u) cos(2 pi u') two devices may so be apart by (1 + 1) / 2 units for a logarithm under a root,
1 + 2 for the cosine, and 1/2 on each side for each of root, product and product with std: 7 of at most 2**-52 of n.
Neighbouring float32 are at least 2**-24 of n apart, so the two round to others with a chance of at most 7 * 2**-28.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.philox import Purpose, normals
from ..parallel.ir.units import Parameter, Slot, Units

BLOCK = 4  # elements that one counter draws: see ``kernels/philox.py``
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 20}  # elements drawn at once, by device: bounds the 64-bit temporaries

Values = Callable[[Parameter, Tensor], Tensor]
"""(parameter, int64 blocks of BLOCK elements, C order of its global shape) -> float64 [..., BLOCK], where these are."""


def initial_values(seed: int) -> Values:
    """``normal`` parameters ~ N(0, std**2); the counter's sample word is a hash of the name."""

    def values(parameter: Parameter, block: Tensor) -> Tensor:
        if parameter.init != "normal":
            return block.new_full((*block.shape, BLOCK), parameter.init == "ones", dtype=torch.float64)
        return parameter.std * _drawn(seed, Purpose.INIT, parameter.name, block)

    return values


def probe_values(seed: int) -> Values:
    """As :func:`initial_values`, but nothing is zero or one: zero gates would hide every gradient behind them.

    Zero-initialised parameters and tables get noise of std 0.2, gains 1 + 0.2 noise.
    """
    initial = initial_values(seed)

    def values(parameter: Parameter, block: Tensor) -> Tensor:
        if parameter.init == "normal" and not parameter.name.startswith("position."):
            return initial(parameter, block)
        return (parameter.init == "ones") + 0.2 * _drawn(seed, Purpose.PROBE, parameter.name, block)

    return values


def _drawn(seed: int, purpose: Purpose, name: str, block: Tensor) -> Tensor:
    zero = block.new_zeros(())
    return normals(seed, purpose, zero, zero + zlib.crc32(name.encode()), block)


def full(parameters: tuple[Parameter, ...], values: Values, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole tensors by name, on one process."""
    weights: dict[str, Tensor] = {}
    for parameter in parameters:
        flat = torch.empty(parameter.elements, dtype=dtype)
        _fill(flat, parameter, 1, 0, 0, values)
        weights[parameter.name] = flat.view(parameter.shape)
    return weights


def global_elements(parameter: Parameter, tp: int, tp_index: int, local: Tensor) -> Tensor:
    """C-order indices in the global shape of elements ``local`` of one tp rank's part."""
    if parameter.tp_dim is None or tp == 1:
        return local
    run = math.prod(parameter.local_shape(tp)[parameter.tp_dim :])  # elements that lie together in the whole
    return local // run * (run * tp) + tp_index * run + local % run


def _fill(flat: Tensor, parameter: Parameter, tp: int, tp_index: int, start: int, values: Values) -> None:
    """Fill ``flat`` with elements ``start`` on of one tp rank's part, drawn where it is."""
    assert start % BLOCK == 0  # ALIGN is a multiple
    whole_blocks = math.prod(parameter.local_shape(tp)[parameter.tp_dim :]) % BLOCK == 0  # else one lies on two ranks
    chunk = _CHUNK[flat.device.type]
    for part, first in zip(flat.split(chunk), range(start, start + len(flat), chunk), strict=True):
        local = torch.arange(first, first + len(part), BLOCK if whole_blocks else 1, device=flat.device)
        element = global_elements(parameter, tp, tp_index, local)
        drawn = values(parameter, element // BLOCK)
        if not whole_blocks:
            drawn = drawn.gather(-1, element[:, None] % BLOCK)
        part.copy_(drawn.flatten()[: len(part)])


def fill_shard(flat: Tensor, units: Units, coordinates: dict[str, int], values: Values) -> None:
    """Fill a rank's flat shard, on whatever device it is; padding becomes zero.

    The same bits under every plan. On another device one float32 in 2**25 may be its neighbour: see [Note: rounding].
    """
    flat = flat.view(-1).zero_()
    for slot, start, stop, position in held_parts(units, coordinates):
        _fill(flat[position : position + stop - start], slot.parameter, units.plan.tp, coordinates["tp"], start, values)


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
            element = global_elements(slot.parameter, units.plan.tp, coordinates["tp"], torch.arange(start, stop))
            weights[slot.parameter.name][element] = flat[position : position + stop - start]
    shapes = {slot.parameter.name: slot.parameter.shape for unit in units.units for slot in unit.slots}
    return {name: value.view(shapes[name]) for name, value in weights.items()}
