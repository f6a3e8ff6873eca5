"""A rank's copies of its part of the states, in memory of the host from which they are written behind training."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ....kernels.dtypes import TORCH_DTYPES
from ....model.runner import StepRunner
from ....parallel.ir.units import Units
from ....parallel.runtime.host import pin
from ....parallel.runtime.mesh import coordinates
from .layout import Layout
from .manifest import SAVED_STATES
from .servers import Lent, ranks_here
from .together import together
from .writing import Shelf

FilesOf = Literal["rank", "server"]
SLOTS = 2  # copies of a shard that are kept in memory, in turn: one is whole while the other is made


def copy_bytes(units: Units) -> int:
    """Of the host, that a rank's copy of its part of the states takes."""
    return -(-units.flat_elements // units.plan.dp_replicate) * _item_bytes(units)


def memory_copy_bytes(units: Units) -> int:
    """Of its server, that a rank's copies in memory take, of its whole shard."""
    return SLOTS * units.flat_elements * _item_bytes(units)


def _item_bytes(units: Units) -> int:
    return TORCH_DTYPES[units.plan.stat_dtype].itemsize * len(SAVED_STATES)


def part_of(flat_elements: int, replicas: int, replica: int) -> tuple[int, int]:
    """(start, stop) of the elements of a shard that one of its replicas writes."""
    return flat_elements * replica // replicas, flat_elements * (replica + 1) // replicas


class HostCopies:
    """Of one rank: a part of its shard, which its replicas share; and the file in which it is written."""

    def __init__(self, runner: StepRunner, layout: Layout, files: FilesOf) -> None:
        """``files``: one of each rank, or one of each server."""
        self.runner, self.layout = runner, layout
        rank = runner.mesh.rank if runner.mesh else 0
        self.start, self.stop = self._part(rank)
        self.of_server = files == "server" and runner.mesh is not None
        self.states: dict[str, Tensor] = {}  # in memory that is asked for once
        self.file_name, self.shelf = f"{rank:05d}.safetensors", None

    def take(self) -> None:
        """This rank's part of every state, as it is now. Collective. Raises CinemeshError, on all ranks."""
        if not self.states:
            self._ask_for_memory()
        for state, copy in self.states.items():
            copy.copy_(self.runner.buffers[state].view(-1)[self.start : self.stop], non_blocking=True)
        if self.runner.executor.device != "cpu":
            torch.cuda.current_stream(self.runner.executor.device).synchronize()
        if self.of_server:
            together(self.runner.mesh, lambda: None)  # all are there: another rank writes them

    def _part(self, rank: int) -> tuple[int, int]:
        """(start, stop) of the elements of its shard that a rank writes."""
        plan = self.runner.plan
        return part_of(self.layout.flat_elements, plan.dp_replicate, coordinates(plan, rank)["dp_replicate"])

    def _ask_for_memory(self) -> None:
        dtype, elements = TORCH_DTYPES[self.runner.plan.stat_dtype], self.stop - self.start
        size = len(SAVED_STATES) * elements * dtype.itemsize

        def ask() -> tuple[Tensor, Lent | None]:
            lent = Lent.of(size) if self.of_server else None
            memory = lent.mine() if lent else torch.empty(size, dtype=torch.uint8)
            if self.runner.executor.device != "cpu":
                what = "the copy of the states that a checkpoint is written from"
                pin(memory, what, "start fewer processes a server")
            return memory, lent

        memory, lent = together(self.runner.mesh, ask)
        if lent:
            self._share(lent, dtype)
        self.states = dict(zip(SAVED_STATES, memory.view(dtype).view(-1, elements), strict=True))

    def _share(self, lent: Lent, dtype: torch.dtype) -> None:
        """Whose parts make a file: those of the ranks here, and the first of them writes it."""
        assert self.runner.mesh is not None
        ranks, every = ranks_here(lent)
        writes = self.runner.mesh.rank == ranks[0]
        seen = together(self.runner.mesh, lambda: [one.seen() for one in every] if writes else None)
        counts = [stop - start for start, stop in map(self._part, ranks)]
        number = ranks.index(self.runner.mesh.rank)
        self.shelf = Shelf(dict.fromkeys(SAVED_STATES, dtype), counts, number, seen)
        self.file_name = f"{ranks[0]:05d}.safetensors"
