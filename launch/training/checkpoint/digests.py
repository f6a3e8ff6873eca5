"""Digests: of the bytes of a block, which no damage survives, and of a state's values, whatever plan holds them.

A state's is the sum, mod 2**64, of every element's bits times a number that follows from the parameter's name and the
element's index in its global shape. A sum does not depend on who adds what: each rank sums over what it holds. It is
there to compare, not to guard: two states that differ have one sum with a chance of about 2**-32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .layout import Piece

# Odd numbers with bits well spread, of SplitMix64 (Steele et al., OOPSLA 2014), as int64.
_GOLDEN, _MIX1, _MIX2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 20}  # elements, by device: the 64-bit temporaries of a part stay in its cache
BITS = {4: torch.int32, 8: torch.int64, 2: torch.int16}  # integers of an item's bytes


def block_digest(data: memoryview | bytes | bytearray) -> str:
    """SHA-256, in hex: the fastest of the strong ones where the CPU has instructions for it (1.6 against 0.8 GB/s)."""
    return hashlib.sha256(data).hexdigest()


def state_sums(runs: Iterable[Piece], states: list[Tensor]) -> list[int]:
    """Of every state the sum over these runs, at their positions of flat buffers. Equal shapes and devices."""
    total = torch.zeros(len(states), dtype=torch.int64, device=states[0].device)
    part = _AT_ONCE[states[0].device.type]
    bits = [state.view(-1).view(BITS[state.element_size()]) for state in states]
    for run in runs:
        name = int.from_bytes(hashlib.sha256(run.parameter.name.encode()).digest()[:8], "little", signed=True)
        for start in range(run.start, run.stop, part):
            stop = min(start + part, run.stop)
            weights = _weights(_global_elements(run, start, stop, total.device), name)
            at = run.position + start - run.start
            for i, state in enumerate(bits):
                words = state[at : at + stop - start].to(torch.int64)
                if state.dtype == torch.int64:  # a difference in high bits alone would be lost in the product
                    words = words ^ ((words >> 32) & 0xFFFFFFFF)
                total[i] += (words * weights).sum()
    return total.tolist()


def digest(sums: int) -> str:
    """A state's sum as it is written."""
    return f"{sums % (1 << 64):016x}"


def _global_elements(run: Piece, start: int, stop: int, device: torch.device) -> Tensor:
    """C-order indices, in rows x columns of the whole parameter, of elements of a tp rank's part."""
    local = torch.arange(start, stop, device=device)
    if run.parameter.rows > 1:
        local += (local // run.columns) * (run.parameter.columns - run.columns)
    return local.add_(run.tp * run.columns)


def _weights(index: Tensor, name: int) -> Tensor:
    """SplitMix64 of a stream that begins at ``name``."""
    z = index.mul_(_GOLDEN).add_(name)
    z = z.bitwise_xor_((z >> 30) & ((1 << 34) - 1)).mul_(_MIX1)
    z = z.bitwise_xor_((z >> 27) & ((1 << 37) - 1)).mul_(_MIX2)
    return z.bitwise_xor_((z >> 31) & ((1 << 33) - 1))
