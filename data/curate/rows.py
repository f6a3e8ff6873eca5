"""Rows of curation, in Parquet: a video or an image, then a clip of one, with all that was measured of it.

A row is a mapping of column names. Every column is a ``pyarrow`` field that says what it holds; a file of equal rows
and fields is equal byte for byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import CinemeshError, in_a_line
from ...files import atomic_file

ClipRow = dict[str, Any]


def titled(name: str, kind: pa.DataType, about: str) -> pa.Field:
    """A column, and what stands in it."""
    return pa.field(name, kind, metadata={"about": about})


ID = titled("id", pa.string(), "of the content: digest of the file, and of a clip its first and last frame")
SERIES = pa.list_(pa.float32())  # a number of every frame
VECTOR = pa.list_(pa.float32())


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], fields: Sequence[pa.Field]) -> None:
    """Write a table of ``fields`` alone; a row's missing value is null. Raises CinemeshError."""
    listed = list(rows)
    table = pa.table(
        [pa.array([row.get(field.name) for row in listed], field.type) for field in fields], schema=pa.schema(fields)
    )
    with atomic_file(path) as part:
        pq.write_table(table, part, compression="zstd")


def read_rows(path: Path, columns: Sequence[str] | None = None, ids: Iterable[str] | None = None) -> list[ClipRow]:
    """The rows of a file, those of ``ids`` where given. Raises CinemeshError for what is no Parquet of ours."""
    try:
        filters = None if ids is None else [("id", "in", list(ids))]
        return pq.read_table(path, columns=None if columns is None else list(columns), filters=filters).to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise CinemeshError(f"cannot read {path}: {in_a_line(error)}", remedy="delete it: it is made again") from error


def text_path(path: Path) -> str:
    """A path as a column holds it. Raises CinemeshError for a name that is no text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CinemeshError(
            f"the name of {os.fsencode(path)!r} is no UTF-8, and no table holds it", remedy="rename it"
        ) from None
    return str(path)


def draw_of(seed: int, purpose: str, row_id: str) -> float:
    """A number in [0, 1) that belongs to a row: the same whatever other rows there are."""
    word = hashlib.sha256(f"{purpose} {row_id}".encode()).digest()
    return float(np.random.Generator(np.random.Philox(key=[seed, int.from_bytes(word[:8], "little")])).random())
