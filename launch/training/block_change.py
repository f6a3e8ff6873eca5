"""What every block changes of what it is given, step by step of a clip that is sampled (Movie Gen 3.4.2, Fig. 10a).

    change = || x_out - x_in || / || x_in ||,  x the residual stream before and behind a block, over tokens and width

The paper draws "the average change between input and output" and gives no formula; this one has no unit, so blocks can
be compared. Sums are of squares: those of ranks and of clips add up, and the ratio is taken last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...model.sampler import Sampler
from ...parallel.runtime.comm import sum_over_ranks
from ...parallel.runtime.executor import BoundRecord


class BlockChange:
    """Watches a sampler that makes clips in ``steps`` steps: its velocities then run record by record, uncaptured.

    ``begin`` says which step comes, and which samples of the batch count; a solver's velocities of a step are summed.
    """

    def __init__(self, sampler: Sampler, steps: int) -> None:
        self.sampler = sampler
        self._doors = _doors(sampler.velocity.records)
        blocks = 1 + max(door.block for door in self._doors.values())
        self._sums = torch.zeros(2, steps, blocks, dtype=torch.float64)  # of x_out - x_in, and of x_in
        self._step, self._counted = 0, torch.zeros(0, dtype=torch.bool)
        self._inside: dict[_Slice, Tensor] = {}  # what was given to blocks that have not handed it on yet
        sampler.watched = self.watch

    def begin(self, step: int, counted: Tensor) -> None:
        """``counted``: bool [B], of this data rank's samples."""
        self._step, self._counted = step, counted.repeat(self.sampler.halves)

    def watch(self, index: int) -> None:
        """After record ``index`` of a velocity."""
        door = self._doors.get(index)
        if door is None:
            return
        at = _Slice(door.block, door.slice)
        x = door.stream.to(torch.promote_types(door.stream.dtype, torch.float32), copy=True)
        if not door.leaves:
            self._inside[at] = x
            return
        given = self._inside.pop(at)
        for row, value in zip(self._sums, (x - given, given), strict=True):
            squares = value.square().sum((0, 2), dtype=torch.float64).cpu()
            row[self._step, door.block] += squares[self._counted].sum()

    def changes(self) -> Tensor:
        """float64 [steps, blocks], over all clips so far, the same on every rank. Collective."""
        moved, given = sum_over_ranks(self._sums) if self.sampler.mesh is not None else self._sums
        return (moved / given).sqrt()


class _Slice(NamedTuple):
    """A slice of the tokens in a block; 0 where the plan takes none."""

    block: int
    number: int


class _Door(NamedTuple):
    """Behind a record: what a slice of the tokens [T, B, D] is when it enters a block, or when it leaves it."""

    block: int
    slice: int
    leaves: bool
    stream: Tensor


def _doors(records: Sequence[BoundRecord]) -> dict[int, _Door]:
    """By the index of their records."""
    enter, leave = list[tuple[int, BoundRecord]](), list[tuple[int, BoundRecord]]()
    for index, record in enumerate(records):
        if record.op.kind in ("add_position", "position_modulate_norm"):
            enter.append((index, record))
        elif record.op.kind == "gated_residual":
            leave.append((index, record))
    last = {record.op.place.block: record.op.role for _, record in leave}  # a block has two: attention's, and the FFN's
    leave = [(index, record) for index, record in leave if record.op.role == last[record.op.place.block]]
    assert len(enter) == len(leave)
    doors: dict[int, _Door] = {}
    for leaves, found in ((False, enter), (True, leave)):
        slices = Counter[int]()
        for index, record in found:
            block = record.op.place.block
            assert block is not None
            stream = record.outputs[0] if leaves else record.inputs[0]
            doors[index] = _Door(block, slices[block], leaves, stream)
            slices[block] += 1
    return doors
