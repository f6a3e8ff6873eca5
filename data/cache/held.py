"""Blocks of neighbours, read at once and held until others take their place."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from ...errors import CinemeshError
from .storage import Storage

HELD_BYTES = 2**30  # of blocks in memory, of a process: of 256 lanes of 4 MB. Small beside a server's memory
GAP_BYTES = 2**18  # between two rows that are read together: shorter than what a read costs to begin

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
        self._good = set[tuple[int, int]]()
        self.size = sum(len(span.data) for span in self._spans)

    def of(self, row: IndexRow) -> RawBytes:
        """A row's bytes. Raises CinemeshError, with file and offset, where they are not as they were written."""
        numbers: tuple[int, int, int] = row["shard"], row["offset"], row["bytes"]
        shard, offset, size = numbers
        span = next(s for s in self._spans if s.shard == shard and s.offset <= offset < s.offset + len(s.data))
        data = span.data[offset - span.offset :][:size]
        if (shard, offset) not in self._good:
            if (found := zlib.crc32(data.data)) != row["crc"]:
                raise CinemeshError(
                    f"{self._storage.place(self._shards[shard])} is damaged at offset {offset:,}: its {size:,} bytes "
                    f"there have crc32 {found:08x}, and the index says {row['crc']:08x}",
                    remedy="restore the file, or delete its folder and build the cache again: it alone is made anew",
                )
            self._good.add((shard, offset))
        return data


class HeldBlocks:
    """Blocks by key, the least used of which goes when they are too many; from any thread, each is read once."""

    def __init__(self, most_bytes: int = HELD_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._blocks: OrderedDict[Any, Future[Block]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Any, read: Callable[[], Block]) -> Block:
        """Raises what ``read`` raises."""
        with self._lock:
            found = self._blocks.get(key)
            mine = found is None
            if found is None:
                found = self._blocks[key] = Future()
            else:
                self._blocks.move_to_end(key)
        if mine:
            try:
                block = read()
            except BaseException as error:
                with self._lock:
                    del self._blocks[key]
                found.set_exception(error)
                raise
            found.set_result(block)
            with self._lock:
                self._bytes += block.size
                self._shrink(key)
        return found.result()

    def _shrink(self, kept: Any) -> None:
        for key in list(self._blocks):
            if self._bytes <= self._most:
                return
            if key != kept and self._blocks[key].done():
                self._bytes -= self._blocks.pop(key).result().size
