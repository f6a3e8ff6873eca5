"""A manifest: clips and their captions as rows of Parquet, in place of a captions file.

    file        of the clip, relative to the manifest's folder; of a tar, with the columns below
    member      optional, of a tar: name, ``offset`` and ``bytes`` of the clip in it
    clip        optional: the clip's own name; default: its file's, and where it begins
    first_s     optional: from and to which second of the file; default: the whole of it
    last_s
    caption     text, or ``captions``: a list of {text, weight}, of which one is drawn whenever the clip is
    weight      optional: how often an epoch takes its windows; 0 is never

Curation writes them, and so does ``cinemesh data index`` from webdataset and Energon tars. Rows are read as they are
needed, whatever their number.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from ..documents import quoted
from ..errors import CinemeshError, did_you_mean, in_a_line
from ..files import atomic_file, file_name
from ..ranges import check_ranges
from .scenes import Scene, wordings
from .sources import Source, Tarred

ENDING = ".parquet"
GROUP_ROWS = 2**14  # read at once
SCHEMA = pa.schema(
    [
        ("clip", pa.string()),
        ("file", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("first_s", pa.float64()),
        ("last_s", pa.float64()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.struct([("text", pa.string()), ("weight", pa.float64())]))),
        ("weight", pa.float64()),
    ]
)
KINDS = {"file": str, "member": str, "clip": str, "caption": str, "offset": int, "bytes": int}
CORRECT = "correct the manifest"


class ClipManifest(Sequence[Scene]):
    """Its clips. Raises CinemeshError for a file that is no manifest, and for a row that cannot be meant, by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            said = getattr(error, "strerror", None) or in_a_line(error)
            raise CinemeshError(
                f"cannot read the manifest {path}: {said}", remedy=f"{CORRECT} or data.captions"
            ) from error
        there = self._file.schema_arrow.names
        self._columns = [name for name in SCHEMA.names if name in there]
        if "file" not in there or not {"caption", "captions"} & {*there}:
            raise CinemeshError(
                f"the manifest {path} has the columns {', '.join(there)}, and file and caption are needed",
                remedy=did_you_mean("file" if "file" not in there else "caption", there),
            )
        groups = self._file.metadata.num_row_groups
        self._ends = list(accumulate(self._file.metadata.row_group(i).num_rows for i in range(groups)))
        self._held: tuple[int, list[dict[str, Any]]] = -1, []

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        if isinstance(index, slice):
            return [self._scene(number) for number in range(len(self))[index]]
        return self._scene(range(len(self))[index])

    def __iter__(self) -> Iterator[Scene]:
        return (self._scene(number) for number in range(len(self)))

    def _scene(self, number: int) -> Scene:
        group = bisect_right(self._ends, number)
        if self._held[0] != group:
            try:
                self._held = group, self._file.read_row_group(group, columns=self._columns).to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise CinemeshError(
                    f"the manifest {self.path} is damaged: {in_a_line(error)}", remedy="restore it"
                ) from error
        before = self._ends[group] - len(self._held[1])
        return self._read(self._held[1][number - before], f"row {number + 1} of {self.path}")

    def _read(self, row: dict[str, Any], where: str) -> Scene:
        given = {name: value for name, value in row.items() if value is not None}
        for name, kind in KINDS.items():
            if name in given and not isinstance(given[name], kind):
                raise CinemeshError(f"{where}: {name} is {quoted(given[name])}", remedy=CORRECT)
        if not given.get("file"):
            raise CinemeshError(f"{where} has no file", remedy=CORRECT)
        source, name = self._source(given, where)
        first, last = (self._seconds(given.get(key), f"{where}: {key}") for key in ("first_s", "last_s"))
        if first is not None and last is not None and last <= first:
            raise CinemeshError(f"{where}: last_s({float(last):g}) <= first_s({float(first):g})", remedy=CORRECT)
        said = wordings(given["captions"], where) if given.get("captions") else ()
        caption = said[0].text if said else given.get("caption", "")
        if not caption.strip():
            raise CinemeshError(f"{where} has no caption", remedy="give it one, or leave the row out")
        begins = f"@{float(first):g}" if first else ""
        clip = file_name(given.get("clip", Path(name).stem + begins), f"{where}: clip")
        weight = given.get("weight", 1.0)
        scene = Scene(clip, str(name), 0, 0, caption, said, weight, first or Fraction(0), last, source)
        check_ranges(scene, f"{where}: ")
        return scene

    def _source(self, given: dict[str, Any], where: str) -> tuple[Source, str]:
        file = Path(given["file"]).expanduser()
        path = file if file.is_absolute() else self.path.parent / file
        told = [name for name in ("member", "offset", "bytes") if name in given]
        if not told:
            return path, str(path)
        if len(told) < 3 or given["offset"] < 0 or given["bytes"] < 0:
            raise CinemeshError(f"{where} says of a member of a tar only {', '.join(told)}", remedy=CORRECT)
        return Tarred(path, given["member"], given["offset"], given["bytes"]), f"{path}/{given['member']}"

    @staticmethod
    def _seconds(value: object, where: str) -> Fraction | None:
        if value is None:
            return None
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise CinemeshError(f"{where} is {quoted(value)}", remedy="it must be a number of seconds, 0 or more")
        return Fraction(value).limit_denominator(10**6)


def write_manifest(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """A manifest of rows, whole or not at all; how many there were. Raises CinemeshError when it cannot be written."""
    count = 0
    with atomic_file(path) as unfinished, pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
        waiting: list[dict[str, Any]] = []
        for row in rows:
            waiting.append(row)
            count += 1
            if len(waiting) == GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(waiting, SCHEMA))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, SCHEMA))
    return count
