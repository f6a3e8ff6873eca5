"""What a measure is, and where its values are kept: computed once for a row, whatever is decided of them later.

    FOLDER/measured/scan-5f0c.../1b7e....parquet     one unit of rows; appears whole or not at all

The folder is called after the measure and all that its values depend on; a file after the rows in it. What is there is
not computed again, so that a killed run goes on where it was, and another threshold reads no video.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import CinemeshError, in_a_line
from .rows import ID, ClipRow, read_rows, write_parquet

KEY_DIGITS = 12  # of a digest in the name of a folder


class Measuring(Protocol):
    """A pure function of rows; its dataclass fields are its parameters."""

    name: ClassVar[str]
    version: ClassVar[int]  # one more whenever its values would change
    reads: ClassVar[tuple[str, ...]]  # measures whose columns it takes beside those of the row itself
    columns: ClassVar[tuple[pa.Field, ...]]  # that it gives
    unit: ClassVar[int]  # rows that are computed and written together

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        """Of each row, its id and values; as many, in their order. A value does not depend on the other rows."""
        ...


def key_of(measure: Measuring, above: Sequence[str]) -> str:
    """All that its values depend on beside the row; ``above``: keys of the measures that it reads."""
    parameters = asdict(measure)  # type: ignore[call-overload]  # a protocol cannot say that it is a dataclass
    told = json.dumps([measure.version, parameters, *above], sort_keys=True, default=str)
    return f"{measure.name}-{hashlib.sha256(told.encode()).hexdigest()[:KEY_DIGITS]}"


@dataclass(frozen=True)
class WorkUnit:
    """Rows to be measured together, and the file for their values. Whole: any process, on any host, can do it."""

    measure: Any  # a Measuring; pickled with its parameters
    rows: list[ClipRow]
    parts: tuple[tuple[str, tuple[str, ...]], ...]  # of what it reads: file, ids in it
    path: Path

    def run(self) -> str:
        """Compute and write; gives the path."""
        read = {row["id"]: row for path, ids in self.parts for row in read_rows(Path(path), ids=ids)}
        given = [row | read.get(row["id"], {}) for row in self.rows]
        write_parquet(self.path, self.measure.of(given), (ID, *self.measure.columns))
        return str(self.path)


class Store:
    """The values of one measure in a folder."""

    def __init__(self, folder: Path, measure: Measuring, above: Sequence[Store] = ()) -> None:
        self.measure, self.above = measure, above
        self.key = key_of(measure, [each.key for each in above])
        self.folder = folder / "measured" / self.key
        self._parts: dict[str, Path] = {}  # by row id
        for path in sorted(self.folder.glob("[!.]*.parquet")):
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            ids = pq.read_table(path, columns=["id"]).column("id").to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise CinemeshError(
                f"cannot read {path}: {in_a_line(error)}", remedy="delete it: it is made again"
            ) from error
        self._parts |= dict.fromkeys(ids, path)

    def units(self, rows: Sequence[ClipRow]) -> Iterator[WorkUnit]:
        """What is to be computed of ``rows``. Whole units come first: a run that goes on makes the same files."""
        missing = [row for row in rows if row["id"] not in self._parts]
        for at in range(0, len(missing), self.measure.unit):
            here = missing[at : at + self.measure.unit]
            name = hashlib.sha256("\n".join(row["id"] for row in here).encode()).hexdigest()
            parts = tuple(part for above in self.above for part in above.parts([row["id"] for row in here]))
            yield WorkUnit(self.measure, here, parts, self.folder / f"{name[:32]}.parquet")

    def took(self, path: str) -> None:
        """A unit was written."""
        self._add(Path(path))

    def parts(self, ids: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
        """Files that hold these rows."""
        found: dict[Path, list[str]] = {}
        for each in ids:
            if each in self._parts:
                found.setdefault(self._parts[each], []).append(each)
        return [(str(path), tuple(here)) for path, here in found.items()]

    def values(self, ids: Sequence[str], columns: Sequence[str] | None = None) -> dict[str, ClipRow]:
        """By id, what was measured of these rows."""
        wanted = None if columns is None else ["id", *columns]
        return {row["id"]: row for path, here in self.parts(ids) for row in read_rows(Path(path), wanted, here)}
