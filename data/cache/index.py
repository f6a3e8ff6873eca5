"""The index of a version: rows in Parquet files, of which a reader opens those that it needs.

    index/8x16x16.train.0123456789abcdef.parquet     PART_ROWS rows at most, in groups of GROUP_ROWS

A part is named by the digest of its rows, so a version that changes a few rows has all other parts from the one before.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import CinemeshError, in_a_line
from ...files import atomic_file
from .storage import Storage

FOLDER = "index"
GROUP_ROWS = 2**13  # read at once: half a megabyte. A block of 4 MB of latents has 128 rows at most of 32 KB
PART_ROWS = 2**22  # of a file: its 512 groups are listed in a megabyte, which is read when the first of them is
OPEN_PARTS = 16  # lists of groups that stay in memory, of an index
HELD_GROUPS = 128  # groups that stay in memory, of an index

LATENT_ROWS = pa.schema(
    [
        ("id", pa.uint32()),  # of the window: it draws what is drawn of its sample
        ("bucket", pa.dictionary(pa.int32(), pa.string())),
        ("clip", pa.string()),  # whose window it is
        ("first_frame", pa.int64()),  # in its video
        ("fps_num", pa.int32()),
        ("fps_den", pa.int32()),
        ("shard", pa.int32()),  # number in the version's list of tars
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("crc", pa.uint32()),  # crc32 of these bytes
        ("weight", pa.float32()),  # as given; it has acted: a row stands here as often as an epoch takes it
        ("caption", pa.int64()),  # its clip's first row in the captions' index
        ("captions", pa.int16()),  # and how many there are
    ]
)
CAPTION_ROWS = pa.schema(
    [
        ("clip", pa.string()),
        ("text", pa.string()),  # as it was encoded, its rate before it
        ("weight", pa.float32()),  # of it among its clip's captions
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("crc", pa.uint32()),
    ]
)


@dataclass(frozen=True)
class IndexPart:
    """A file of an index."""

    file: str
    rows: int


class IndexWriter:
    """Rows of one list, in order, to parts below the folder ``root``; ``parts`` when it is closed."""

    def __init__(self, root: Path, name: str, schema: pa.Schema) -> None:
        self._root, self._name, self._schema = root, name, schema
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self.parts: list[IndexPart] = []

    def add(self, rows: pa.Table) -> None:
        while rows.num_rows:
            taken = rows.slice(0, PART_ROWS - self._rows)
            self._waiting.append(taken)
            self._rows += taken.num_rows
            rows = rows.slice(taken.num_rows)
            if self._rows == PART_ROWS:
                self._write()

    def close(self) -> list[IndexPart]:
        if self._rows:
            self._write()
        return self.parts

    def _write(self) -> None:
        table = pa.concat_tables(self._waiting).select(self._schema.names).cast(self._schema)
        self.parts.append(write_index_part(self._root, self._name, table))
        self._waiting, self._rows = [], 0


def write_index_part(root: Path, name: str, table: pa.Table) -> IndexPart:
    """A part below ``root``, unless it is there."""
    part = IndexPart(f"{FOLDER}/{name}.{rows_digest(table)}.parquet", table.num_rows)
    if not (root / part.file).exists():
        with atomic_file(root / part.file) as unfinished:
            write_index_rows(table, unfinished)
    return part


def write_index_rows(table: pa.Table, path: Path) -> None:
    options: dict[str, Any] = {
        "row_group_size": GROUP_ROWS,
        "compression": "zstd",
        "write_statistics": False,
        "write_page_checksum": True,
    }
    pq.write_table(table, path, **options)


def rows_digest(table: pa.Table) -> str:
    """Of the values, whatever wrote them and however they are packed."""
    digest = hashlib.sha256()
    for field in table.schema:
        digest.update(f"{field.name} {field.type}\n".encode())
        column = table.column(field.name)
        if pa.types.is_string(field.type) or pa.types.is_dictionary(field.type):
            for text in column.cast(pa.string()).to_pylist():
                data = text.encode()
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        else:
            digest.update(column.to_numpy().tobytes())
    return digest.hexdigest()[:16]


class Index:
    """Rows of a list of parts, by their place in it; from any thread. Opens nothing before a row is asked for."""

    def __init__(self, storage: Storage, parts: Sequence[IndexPart], schema: pa.Schema = LATENT_ROWS) -> None:
        self._storage, self._parts, self._schema = storage, parts, schema
        self._ends = list(accumulate(part.rows for part in parts))
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Rows ``first`` to ``first + count`` - 1. Raises CinemeshError for a part that is damaged."""
        assert first >= 0 and first + count <= len(self), (first, count, len(self))
        found: list[dict[str, Any]] = []
        while count:
            number = bisect_right(self._ends, first)
            inside = first - (self._ends[number] - self._parts[number].rows)
            group = inside // GROUP_ROWS
            taken = self._group(number, group).slice(inside % GROUP_ROWS, count)
            found += _as_rows(taken)
            first, count = first + taken.num_rows, count - taken.num_rows
        return found

    def columns(self, *names: str) -> Iterator[pa.Table]:
        """These columns of all rows, or all columns, part by part: for what looks at a whole version."""
        for part in self._parts:
            yield self._read(part, lambda file: file.read(columns=list(names) or None))

    def _group(self, number: int, group: int) -> pa.Table:
        with self._lock:
            key = number, group
            found = self._groups.pop(key, None)
            if found is None:
                file = self._open.pop(number, None)
                if file is None:
                    file = self._opened(self._parts[number])
                self._open[number] = file
                if len(self._open) > OPEN_PARTS:
                    self._open.popitem(last=False)
                try:
                    found = file.read_row_group(group, use_threads=False)
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise self._damaged(self._parts[number], f"its row group {group} cannot be read", error) from error
            self._groups[key] = found
            if len(self._groups) > HELD_GROUPS:
                self._groups.popitem(last=False)
            return found

    def _opened(self, part: IndexPart) -> pq.ParquetFile:
        file = self._read(part, lambda file: file)
        if file.metadata.num_rows != part.rows:
            raise self._damaged(part, f"it holds {file.metadata.num_rows:,} rows of {part.rows:,}")
        return file

    def _read(self, part: IndexPart, what: Any) -> Any:
        try:
            file = pq.ParquetFile(self._storage.opened(part.file), page_checksum_verification=True)
            if not file.schema_arrow.equals(self._schema):
                raise ValueError("it has other columns")
            return what(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(part, "it cannot be read", error) from error

    def _damaged(self, part: IndexPart, how: str, error: Exception | None = None) -> CinemeshError:
        said = f" ({in_a_line(error)})" if error else ""
        return CinemeshError(
            f"{self._storage.place(part.file)} is damaged: {how}{said}",
            remedy="restore it, or delete it and build the cache again: no latent is encoded anew",
        )


def _as_rows(table: pa.Table) -> list[dict[str, Any]]:
    """What ``to_pylist`` gives, in half the time: most of it is spent on what is a dictionary's."""
    columns = [c.cast(pa.string()) if pa.types.is_dictionary(c.type) else c for c in table.columns]
    names, rows = table.column_names, zip(*(column.to_pylist() for column in columns), strict=True)
    return [dict(zip(names, values, strict=True)) for values in rows]


def is_any_of(column: pa.ChunkedArray, values: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Of each row, whether its value is one of these."""
    options = pc.SetLookupOptions(value_set=pa.array(values, column.type))
    return pc.call_function("is_in", [column], options).to_numpy()
