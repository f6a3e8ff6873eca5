"""Writing one file of a checkpoint: what ranks hold of every state, with digests of what is written.

A safetensors file of a tensor a state, which any reader of that format opens; ours goes by the manifest. A file has one
part, a rank's, or those of all ranks of a server: their tensors are then called after their part, ``3.ema``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ....errors import CinemeshError
from ...storage.places import Location, write_file
from .digests import block_digest, state_sums
from .layout import Coordinates, Layout
from .manifest import MANIFEST, ShardFile, ShardPart

BLOCK_ELEMENTS = 1 << 24  # 64 MiB in float32: what is read at once, and the least that a reader must read
TRIES = 2  # at a file
RETRY_AFTER_S = 1.0
MOST_THREADS = 8  # of a rank: SHA-256 and sums take about 1.4 s a GB and core (2 cores, 2026-11), a disk seldom less

_SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Written:
    """A file, with one of its parts, and that part's sums of every state."""

    file: ShardFile
    sums: list[int]


@dataclass(frozen=True)
class Shelf:
    """A file of parts, and which of them is this rank's: ``counts`` are the elements of each, of states of one dtype.

    ``memories``: all parts' bytes, of whoever writes the file; None: another rank does.
    """

    dtypes: Mapping[str, torch.dtype]
    counts: Sequence[int]
    number: int
    memories: Sequence[memoryview] | None

    @classmethod
    def of_one(cls, states: Mapping[str, Tensor]) -> Shelf:
        """A file that has one part."""
        (elements,) = {len(values) for values in states.values()}
        dtypes = {state: values.dtype for state, values in states.items()}
        return cls(dtypes, [elements], 0, [*map(_bytes, states.values())])

    @cached_property
    def header(self) -> bytes:
        """What the file begins with, as safetensors has it: one tensor a state and part, one behind the other."""
        rows: dict[str, Any] = {"__metadata__": {"layout": MANIFEST}}
        end = 0
        for number, count in enumerate(self.counts):
            for state, dtype in self.dtypes.items():
                begin, end = end, end + count * dtype.itemsize
                name = state if len(self.counts) == 1 else f"{number}.{state}"
                rows[name] = {"dtype": _SAFETENSORS[dtype], "shape": [count], "data_offsets": [begin, end]}
        text = json.dumps(rows).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def begin(self, number: int) -> int:
        """The byte of the file at which a part begins; behind the last, its end."""
        each = sum(dtype.itemsize for dtype in self.dtypes.values())
        return len(self.header) + each * sum(self.counts[:number])


def write_part(
    path: Location,
    layout: Layout,
    at: Coordinates,
    start: int,
    states: Mapping[str, Tensor],
    shelf: Shelf | None = None,
) -> Written:
    """Write a part of the flat shard at coordinates ``at``, its elements from ``start`` on, from CPU tensors [n].

    In a file of its own, or as the ``shelf`` says. Tried again once. Raises OSError, and CinemeshError of an object
    store.
    """
    shelf = shelf or Shelf.of_one(states)
    with ThreadPoolExecutor(1) as beside:
        writing = None
        if shelf.memories is not None:
            writing = beside.submit(_write, path, [memoryview(shelf.header), *shelf.memories])
        blocks, sums = _digested(layout, at, start, states)
        if writing is not None:
            writing.result()
    part = ShardPart(shelf.begin(shelf.number), at, start, start + shelf.counts[shelf.number], blocks)
    file = ShardFile(path.name, shelf.begin(len(shelf.counts)), block_digest(shelf.header), (part,))
    return Written(file, sums)


def _write(path: Location, chunks: Sequence[memoryview]) -> None:
    for left in reversed(range(TRIES)):
        try:
            write_file(path, chunks)
            return
        except (OSError, CinemeshError):
            if not left:
                raise
            time.sleep(RETRY_AFTER_S)


def _digested(
    layout: Layout, at: Coordinates, start: int, states: Mapping[str, Tensor]
) -> tuple[dict[str, list[str]], list[int]]:
    """Of every state the digests of its blocks; and sums, as digests of states are made of."""
    elements = len(next(iter(states.values())))
    whole = [run.within(start, start + elements) for run in layout.runs(at)]
    runs = [run for run in whole if run is not None]

    def digest(first: int) -> tuple[list[str], list[int]]:
        last = min(first + BLOCK_ELEMENTS, elements)
        block = [values[first:last] for values in states.values()]
        inside = (run.within(first, last) for run in runs)
        sums = state_sums((run for run in inside if run is not None), block)
        return [block_digest(_bytes(values)) for values in block], sums

    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
        done = list(threads.map(digest, range(0, elements, BLOCK_ELEMENTS)))
    blocks = {state: [digests[i] for digests, _ in done] for i, state in enumerate(states)}
    return blocks, [sum(of[i] for _, of in done) for i in range(len(states))]


def _bytes(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data
