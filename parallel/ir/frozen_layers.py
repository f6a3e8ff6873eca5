"""Frozen weights beside a step's program, of which each rank holds a shard: what is gathered, in bytes (torch-free).

A text encoder's layers are such (Movie Gen, A.2: UL2 is FSDP-only, over the data-parallel group of each TP rank). They
run between two steps, a layer at a time: while one computes, the next one's weights come in. Planner, preflight and the
ranks count with this.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import FSDP
from .plan import Plan

GATHERS = "all_gather"  # the kind of collective, on the communicator that gathers the step's own units
BUFFERS = 2  # of gathered weights: of the unit that computes, and of the next one
TURN_STEPS = 8  # of a run whose text is encoded at once: UL2's gathers over 6,144 GPUs then hide behind its compute
UNIT_ALIGN_BYTES = 256  # of every parameter in a unit, as in a step's own


@dataclass(frozen=True)
class FrozenLayers:
    """Elements: ``units`` of what is gathered at once, in the order of use, ``whole`` of what every rank holds."""

    units: tuple[int, ...]
    whole: int
    element_bytes: int

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return self.element_bytes * (self.whole + sum(self.units))

    def share(self, unit: int, ranks: int) -> int:
        """Elements of a unit that each of ``ranks`` holds, the last one's filled up."""
        step = UNIT_ALIGN_BYTES // self.element_bytes
        return -(-self.units[unit] // (ranks * step)) * step

    def gathered_bytes(self, unit: int, ranks: int) -> int:
        return ranks * self.share(unit, ranks) * self.element_bytes

    def buffer_units(self, buffer: int) -> range:
        """Those that are gathered into a buffer: they take turns."""
        return range(buffer, len(self.units), BUFFERS)

    def held_bytes(self, ranks: int) -> int:
        """Of one rank, where ``ranks`` share the units: whole weights, shards and buffers."""
        if ranks == 1:
            return self.bytes
        shards = sum(self.share(unit, ranks) for unit in range(len(self.units)))
        largest = (
            max((self.gathered_bytes(unit, ranks) for unit in self.buffer_units(buffer)), default=0)
            for buffer in range(BUFFERS)
        )
        return self.element_bytes * (self.whole + shards) + sum(largest)


def sharing_ranks(plan: Plan) -> int:
    """Ranks that share the weights: those of equal tp and dp_replicate."""
    return plan.size(FSDP)
