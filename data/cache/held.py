"""Blocks of neighbours, read at once and held until others take their place."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import Any

import numpy as np

from ...documents import parse_json
from ...errors import CinemeshError
from .storage import Storage

HELD_BYTES = 2**31  # of blocks in memory, of a process: of 256 lanes of 4 MB, and the next of each. A server has TBs
GAP_BYTES = 2**18  # between two rows that are read together: shorter than what a read costs to begin

DTYPES: dict[str, type[np.generic]] = {"F32": np.float32, "U8": np.uint8, "BOOL": np.bool_}  # of safetensors

Array = np.ndarray[Any, Any]
RawBytes = np.ndarray[Any, np.dtype[np.uint8]]
IndexRow = dict[str, Any]  # of an index


@dataclass(frozen=True)
class ReadSpan:
    """RawBytes of a shard from ``offset`` on."""

    shard: int
    offset: int
    data: RawBytes


class Block:
    """Rows of an index, and the bytes of their members."""

    def __init__(
        self, storage: Storage, shards: Sequence[str], rows: Sequence[IndexRow], others: Sequence[IndexRow] = ()
    ) -> None:
        """Read. ``others``: of another index, with them. Raises CinemeshError for a shard that cannot be read."""
        self.rows, self.others = rows, {row["place"]: row for row in others}
        self._storage, self._shards = storage, shards
        runs: list[list[int]] = []  # shard, from, to
        for row in sorted((*rows, *others), key=lambda row: (row["shard"], row["offset"])):
            end = row["offset"] + row["bytes"]
            if runs and runs[-1][0] == row["shard"] and row["offset"] <= runs[-1][2] + GAP_BYTES:
                runs[-1][2] = max(runs[-1][2], end)
            else:
                runs.append([row["shard"], row["offset"], end])
        self._spans = [ReadSpan(n, at, storage.read(shards[n], at, end - at)) for n, at, end in runs]
        self._begins = [(span.shard, span.offset) for span in self._spans]
        self._arrays: dict[tuple[int, int], dict[str, Array]] = {}
        self.size = sum(len(span.data) for span in self._spans)

    def arrays(self, row: IndexRow) -> dict[str, Array]:
        """A row's tensors by name, in the block's memory.

        Raises CinemeshError, with file and offset, where its bytes are not as they were written.
        """
        at: tuple[int, int] = (row["shard"], row["offset"])
        if (found := self._arrays.get(at)) is None:
            found = self._arrays[at] = member_arrays(self._checked(*at, row["bytes"], row["crc"]))
        return found

    def _checked(self, shard: int, offset: int, size: int, crc: int) -> RawBytes:
        span = self._spans[bisect_right(self._begins, (shard, offset)) - 1]
        data = span.data[offset - span.offset : offset - span.offset + size]
        if (found := zlib.crc32(data.data)) != crc:
            raise CinemeshError(
                f"{self._storage.place(self._shards[shard])} is damaged at offset {offset:,}: its {size:,} bytes "
                f"there have crc32 {found:08x}, and the index says {crc:08x}",
                remedy="restore the file, or delete its folder and build the cache again: it alone is made anew",
            )
        return data


_layouts: dict[bytes, list[tuple[str, type[np.generic], list[int], int, int]]] = {}  # of headers read: few differ


def member_arrays(data: RawBytes) -> dict[str, Array]:
    """Of a member's bytes, without a copy. What safetensors does, whose reader takes bytes alone and copies them."""
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = data[8:start].tobytes()
    if (layout := _layouts.get(header)) is None:
        told = parse_json(header.decode(), "the header of a member", "see `cinemesh data check`")
        layout = _layouts[header] = [
            (name, DTYPES[at["dtype"]], at["shape"], *(start + end for end in at["data_offsets"]))
            for name, at in told.items()
            if name != "__metadata__"
        ]
    return {name: data[begin:end].view(dtype).reshape(shape) for name, dtype, shape, begin, end in layout}


class _Held:
    """A block that is read, or will be."""

    def __init__(self) -> None:
        self.block: Block | None = None
        self.read: Future[Block] = Future()
        self.uses = count(1)


class HeldBlocks:
    """Blocks by key, the first of which go when they are too many; from any thread, each is read once."""

    def __init__(self, most_bytes: int = HELD_BYTES) -> None:
        self.most_bytes, self._bytes = most_bytes, 0
        self._blocks: dict[Any, _Held] = {}
        self._lock = Lock()

    def get(self, key: Any, read: Callable[[], Block], uses: int = 0) -> Block:
        """``uses``: after so many a block goes, for its memory to serve the next; 0: it stays as long as it may.

        Raises what ``read`` raises.
        """
        held = self._blocks.get(key) or self._held(key, read)  # without a lock: samples are asked for one by one
        block = held.block or held.read.result()
        if uses and next(held.uses) == uses:
            with self._lock:
                self._remove(key, held)
        return block

    def ahead(self, key: Any, read: Callable[[], Block]) -> None:
        """Have it, for those who get it later. Raises what ``read`` raises."""
        self._held(key, read)

    def _held(self, key: Any, read: Callable[[], Block]) -> _Held:
        with self._lock:
            if (held := self._blocks.get(key)) is not None:
                return held
            held = self._blocks[key] = _Held()
        try:
            held.block = read()
        except BaseException as error:
            with self._lock:
                del self._blocks[key]
            held.read.set_exception(error)
            raise
        with self._lock:
            self._bytes += held.block.size
            held.read.set_result(held.block)
            for first in [at for at in self._blocks if at != key]:
                if self._bytes <= self.most_bytes:
                    break
                self._remove(first, self._blocks[first])
        return held

    def _remove(self, key: Any, held: _Held) -> None:
        """Unless it was, or is not there yet."""
        if held.block is not None and self._blocks.get(key) is held:
            del self._blocks[key]
            self._bytes -= held.block.size
