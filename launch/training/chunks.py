"""Chunks: what a rank holds of every parameter, as boxes of its global shape, and DCP's planners over them.

A rank's flat shard holds a run of a parameter's tp-local part in C order. Such a run is a few boxes of the global
tensor, and each box is contiguous in the shard: its data is a view. torch.distributed.checkpoint (DCP) matches the
boxes that are wanted with the boxes that were written, whatever plans made them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from ...errors import CinemeshError
from ...model.weights import held_parts
from ...parallel.ir.units import Units

OTHER_MODEL = "load it with the recipe that wrote it, or name another checkpoint or output directory"


def shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    return "absent" if value is None else str(value)


@dataclass(frozen=True)
class Chunk:
    """A box of the global tensor ``key``; ``data`` is a view of what this rank holds, shaped like the box."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, torch.Size(self.offsets))

    @property
    def metadata(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.data.shape)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that make up elements ``start`` to ``stop`` in C order, in that order.

    At most 2 * ndim - 1: a run ends a row, fills whole rows, begins a row, and so on inside the rows.
    """
    rest = tuple(shape[1:])
    inner = math.prod(rest)
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)

    def within(row: int, a: int, b: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        for offsets, sizes in boxes(rest, a, b):
            yield (row, *offsets), (1, *sizes)

    if first == last:
        yield from within(first, head, tail)
        return
    if head:
        yield from within(first, head, inner)
        first += 1
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    if tail:
        yield from within(last, 0, tail)


def chunks(state: str, flat: Tensor, units: Units, coordinates: dict[str, int]) -> list[Chunk]:
    """All that a rank holds of one state, as boxes of the parameters' global shapes."""
    flat = flat.view(-1)
    found: list[Chunk] = []
    for slot, start, stop, position in held_parts(units, coordinates):
        row = slot.parameter
        local = row.local_shape(units.plan.tp)
        for offsets, sizes in boxes(local, start, stop):
            shifted = list(offsets)
            if row.tp_dim is not None:
                shifted[row.tp_dim] += coordinates["tp"] * local[row.tp_dim]
            elements = math.prod(sizes)
            data = flat[position : position + elements].view(sizes)
            found.append(Chunk(f"{state}/{row.name}", row.shape, tuple(shifted), data))
            position += elements
    return found


class ChunkSavePlanner(DefaultSavePlanner):
    """Plans to write these chunks; DCP's own global plan then checks that they tile every tensor exactly once."""

    def __init__(self, mine: list[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.chunks = {chunk.index: chunk for chunk in mine}

    def create_local_plan(self) -> SavePlan:
        """One item to write for every chunk, under its tensor's name and offsets."""
        self.plan = SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk.metadata, TensorProperties.create_from_tensor(chunk.data), torch.Size(chunk.shape)
                    ),
                )
                for index, chunk in self.chunks.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.chunks[index].data


Written = tuple[SavePlan, list[WriteResult]]  # what a rank planned to write, and where it did


def write_chunks(folder: Path, mine: list[Chunk], rank: int) -> Written:
    """Write what a rank holds to files of its own, ``__RANK_*.distcp``; that asks no other rank.

    DCP's ``save`` gathers and scatters plans over a process group of all ranks, which on GPUs is NCCL's.
    """
    writer, planner = FileSystemWriter(folder), ChunkSavePlanner(mine)
    writer.set_up_storage_writer(False, rank=rank, use_collectives=False)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    return plan, writer.write_data(planner.finish_plan(plan), planner).wait()


def write_metadata(folder: Path, written: Sequence[Written]) -> None:
    """What makes the files of all ranks one checkpoint; checked that their boxes tile every tensor exactly once."""
    _, metadata = ChunkSavePlanner([]).create_global_plan([plan for plan, _ in written])
    FileSystemWriter(folder).finish(metadata, [results for _, results in written])


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Plans to read these chunks. The checkpoint's tensors of the wanted states must be exactly those in ``shapes``.

    Unless ``cast``, so must their dtypes be.
    """

    def __init__(self, path: Path, mine: list[Chunk], shapes: dict[str, tuple[int, ...]], cast: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.path, self.shapes, self.cast = path, shapes, cast
        self.chunks = {chunk.index: chunk for chunk in mine}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None and not state_dict
        self.stored = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def create_local_plan(self) -> LoadPlan:
        """Items to read for every chunk. Raises CinemeshError when names, shapes or dtypes are not this model's."""
        states = {key.partition("/")[0] for key in self.shapes}
        stored = {key: tuple(e.size) for key, e in self.stored.items() if key.partition("/")[0] in states}
        for key in (*self.shapes, *stored):
            there, here = stored.get(key), self.shapes.get(key)
            if there != here:
                raise CinemeshError(
                    f"checkpoint {self.path} is of another model: {key} is {shown(there)} there and {shown(here)} here",
                    remedy=OTHER_MODEL,
                )
        for chunk in () if self.cast else self.chunks.values():
            there, here = self.stored[chunk.key].properties.dtype, chunk.data.dtype
            if there != here:
                raise CinemeshError(
                    f"checkpoint {self.path} holds {chunk.key} as {there}, this plan as {here}",
                    remedy="resume with the dtype policy that wrote it (plan.dtype)",
                )
        wanted: dict[str, list[ChunkStorageMetadata]] = {}
        for chunk in self.chunks.values():
            wanted.setdefault(chunk.key, []).append(chunk.metadata)
        return LoadPlan(
            [
                item
                for key, local in wanted.items()
                for item in create_read_items_for_chunk_list(key, self.stored[key], local)
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.chunks[index].data
