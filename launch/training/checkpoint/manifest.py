"""The manifest of a checkpoint: everything that a reader must know, and how what is damaged or foreign is told.

A JSON file of three lines; the second is the body, and the first has its digest:

    {"format": 4, "sha256": "...", "body":
    {"step": 100, ..., "layout": {...}, "files": [...]}
    }

It is written when all else of a checkpoint is there. Nothing of it is believed before it was checked.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from ....documents import exactly, parse_json, quoted
from ....errors import CinemeshError, in_a_line
from ....files import file_name
from ....kernels.dtypes import TORCH_DTYPES
from ....kernels.packages import version_of
from ...storage.places import AnyLocation, Location, read_file
from .digests import block_digest
from .layout import SHARDING, Coordinates, FlatParameter, FlatUnit, Layout

# Raise it when names or what they mean change, or what the next step does with them.
FORMAT = 4
ONE_PART_A_FILE = 3  # the format before: a file is its part, and its states end where it ends
READS = (ONE_PART_A_FILE, FORMAT)
LAST_DCP_COMMIT = "f947c57"  # read formats 1 and 2: files of torch.distributed.checkpoint, 2026-11-29
MANIFEST = "cinemesh.json"
SAVED_STATES = ("master", "exp_avg", "exp_avg_sq", "ema")
COUNTERS = "counters"  # (step, updates): numbers of the manifest, a buffer of a runner

RESTORE = "restore the file, or move this checkpoint away: the run then goes on from an earlier one, or from step 0"
_OTHER_VERSION = "read it with the version that wrote it, or train anew in another logging.directory"
_NAME = re.compile(r"step-(\d{8,})")
_HEX = re.compile(r"[0-9a-f]{64}")


class Damaged(CinemeshError):
    """A checkpoint is not as it was written: an earlier one may be whole."""

    def __init__(self, path: Location, what: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {what}", remedy=RESTORE)
        self.path, self.damage = path, what
        self.args = (path, what)  # what makes it again, on another rank


@dataclass(frozen=True)
class ShardPart:
    """Elements ``start`` to ``stop`` of the flat shard at coordinates ``at``, from byte ``begin`` of a file on.

    One state behind the other. ``blocks``: of every state, digests of its blocks.
    """

    begin: int
    at: Coordinates
    start: int
    stop: int
    blocks: dict[str, list[str]]


@dataclass(frozen=True)
class ShardFile:
    """One file: its parts, one behind the other. ``header``: digest of what stands before the first."""

    name: str
    size_bytes: int
    header: str
    parts: tuple[ShardPart, ...]

    @property
    def header_bytes(self) -> int:
        return min(part.begin for part in self.parts)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is and where it lies.

    ``states``: dtype by state, in the order of the files. ``block_elements``: of every state, from one digest to the
    next. ``digests``: of every state, one that no plan changes. ``note``: JSON values of the run.
    """

    step: int
    updates: int
    model: dict[str, Any]
    plan: dict[str, Any]
    code: dict[str, Any]
    note: dict[str, Any]
    states: dict[str, str]
    digests: dict[str, str]
    block_elements: int
    layout: Layout
    files: tuple[ShardFile, ...]

    def item_bytes(self, state: str) -> int:
        return TORCH_DTYPES[self.states[state]].itemsize

    def data_begin(self, part: ShardPart, state: str) -> int:
        """Where a state of a part begins in its file."""
        before = list(self.states)[: list(self.states).index(state)]
        return part.begin + sum(map(self.item_bytes, before)) * (part.stop - part.start)

    def text(self) -> str:
        """As it is written."""
        return sealed(FORMAT, json.dumps(_values(self), default=_values, separators=(",", ":")))


@functools.cache
def code_here() -> dict[str, str | None]:
    """Versions of what computes; the commit where this is a checkout of git."""
    root = Path(__file__).parents[3]
    try:
        found = subprocess.run(("git", "-C", root, "rev-parse", "HEAD"), capture_output=True, text=True, timeout=10)
        commit = found.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"cinemesh": version_of("cinemesh"), "commit": commit, "torch": torch.__version__}


def _values(record: Any) -> dict[str, Any]:
    """As ``asdict``, without its copies of all that is inside."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def read_manifest(path: Location) -> Manifest:
    """Of the checkpoint in folder ``path``, checked in itself; no other file is looked at.

    Raises Damaged when it is not as it was written or contradicts itself, and CinemeshError when it is of another
    format or not there.
    """
    if not (path / MANIFEST).is_file():
        if path.is_dir():
            raise Damaged(path, f"it has no {MANIFEST}, which is written when all else is there")
        raise CinemeshError(
            f"cannot read the manifest {path / MANIFEST}: there is no such file",
            remedy="name a complete checkpoint, a step-* folder of a run",
        )
    text = _text(path)
    try:
        found = parse_json(text, "the manifest", "")
    except CinemeshError as error:
        raise Damaged(path, error.problem) from None
    written_by = found.get("format") if isinstance(found, dict) else None
    if type(written_by) is int and "sha256" not in found and written_by not in READS:
        since = f"commit {LAST_DCP_COMMIT} reads it" if written_by < FORMAT else "a later version wrote it"
        raise _other_format(path, written_by, since)
    if type(written_by) is not int or text != sealed(written_by, *text.split("\n")[1:2]):
        raise Damaged(path, f"{MANIFEST} is not as it was written")
    if written_by not in READS:
        raise _other_format(path, written_by, "a later version wrote it")
    try:
        manifest = _manifest(found.get("body"), written_by)
    except CinemeshError as error:
        raise Damaged(path, f"{MANIFEST}: {error.problem}") from None
    if step_of(path) not in (None, manifest.step):
        raise Damaged(path, f"it is of step {manifest.step}")
    return manifest


def _text(path: Location) -> str:
    try:
        return read_file(path / MANIFEST).decode()  # cut short, its seal is broken
    except (OSError, ValueError) as error:
        raise Damaged(path, f"cannot read {MANIFEST}: {in_a_line(error)}") from error


def _other_format(path: Location, number: int, since: str) -> CinemeshError:
    reads = " and ".join(map(str, READS))
    return CinemeshError(
        f"checkpoint {path} has format {number}, this version reads {reads}: {since}", remedy=_OTHER_VERSION
    )


def step_folder(directory: AnyLocation, step: int) -> AnyLocation:
    return cast(AnyLocation, directory / f"step-{step:08d}")


def step_of(path: Location) -> int | None:
    """By its folder's name, or None for a folder that is not named so."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def check_size(path: Location, file: ShardFile, there: int | None) -> None:
    """Raise Damaged unless a file has its size; ``there`` is what it has, None where it is missing."""
    if there != file.size_bytes:
        state = "is missing" if there is None else f"has {there:,} bytes"
        raise Damaged(path, f"{file.name} {state}, it was written with {file.size_bytes:,} bytes")


def sealed(number: int, body: str = "") -> str:
    """A manifest with this body, which is one line."""
    digest = block_digest(f"{number}\n{body}".encode())
    return f'{{"format": {number}, "sha256": "{digest}", "body":\n{body}\n}}\n'


# -- what a body must be ----------------------------------------------------------------------------------------------


def _manifest(body: object, number: int) -> Manifest:
    kinds = {field.name: _KINDS.get(field.name, dict) for field in fields(Manifest)}
    found = exactly(body, "the body", kinds, remedy=RESTORE)
    for key in ("step", "updates", "block_elements"):
        _whole(found[key], key, least=int(key == "block_elements"))
    states = found["states"]
    if not states or any(not isinstance(dtype, str) or dtype not in TORCH_DTYPES for dtype in states.values()):
        raise _wrong("states", states)
    if found["digests"].keys() != states.keys() or not all(isinstance(v, str) for v in found["digests"].values()):
        raise _wrong("digests", found["digests"])
    encoders = found["model"].get("encoders", [])  # an autoencoder has none
    if not isinstance(encoders, list) or not all(
        isinstance(e, dict) and {"name", "width"} <= e.keys() for e in encoders
    ):
        raise _wrong("encoders", encoders)
    layout = _layout(found["layout"])
    one_part = states if number == ONE_PART_A_FILE else None
    files = tuple(_file(each, f"file {i}", layout, one_part) for i, each in enumerate(found["files"]))
    made = Manifest(**(found | {"layout": layout, "files": files}))
    _check_files(made)
    return made


_KINDS: dict[str, type] = {
    **dict.fromkeys(("step", "updates", "block_elements"), int),
    "files": list,
}


def _wrong(what: str, value: object) -> CinemeshError:
    return CinemeshError(f"{what} is {quoted(value)}")


def _whole(value: object, what: str, *, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise _wrong(what, value)
    return value


def _layout(value: object) -> Layout:
    found = exactly(value, "layout", {"degrees": dict, "units": list}, remedy=RESTORE)
    degrees = exactly(found["degrees"], "degrees", dict.fromkeys(SHARDING, int), remedy=RESTORE)
    for axis, size in degrees.items():
        _whole(size, axis, least=1)
    units = tuple(_unit(each, f"unit {number}", degrees) for number, each in enumerate(found["units"]))
    layout = Layout(degrees, units)
    if not units:
        raise _wrong("units", [])
    names = [parameter.name for unit in units for parameter in unit.parameters]
    if len(set(names)) < len(names):
        raise _wrong("a name of two parameters", max(names, key=names.count))
    spans = [(unit.position, unit.position + layout.shard_elements(unit), unit.name) for unit in units]
    _apart(spans)
    return layout


def _unit(value: object, where: str, degrees: Coordinates) -> FlatUnit:
    kinds = {"name": str, "elements": int, "axes": list, "position": int, "parameters": list}
    found = exactly(value, where, kinds, remedy=RESTORE)
    axes = found["axes"]
    if sorted(map(str, axes)) not in (sorted(SHARDING), sorted(set(SHARDING) - {"tp"})):
        raise _wrong(f"axes of {where}", axes)
    shards = math.prod(degrees[axis] for axis in axes)
    elements = _whole(found["elements"], f"elements of {where}", least=1)
    if elements % shards:
        raise _wrong(f"elements of {where}, over {shards} shards,", elements)
    _whole(found["position"], f"position of {where}")
    tp = 1 if "tp" in axes else degrees["tp"]
    parameters = tuple(
        _parameter(each, f"parameter {number} of {where}", tp) for number, each in enumerate(found["parameters"])
    )
    ends = [(p.offset, p.offset + math.prod(p.shape) // tp, p.name) for p in parameters]
    _apart([*ends, (elements, elements, "the end")])
    return FlatUnit(found["name"], elements, tuple(axes), found["position"], parameters)


def _parameter(value: object, where: str, tp: int) -> FlatParameter:
    kinds = {"name": str, "shape": list, "tp_dim": int | None, "offset": int}
    found = exactly(value, where, kinds, remedy=RESTORE)
    shape, dim = found["shape"], found["tp_dim"]
    for size in shape:
        _whole(size, f"a dim of {where}", least=1)
    if dim is not None and (_whole(dim, f"tp_dim of {where}") >= len(shape) or shape[dim] % tp):
        raise _wrong(f"tp_dim of {where}, over tp({tp}),", dim)
    if dim is None and tp > 1:
        raise _wrong(f"tp_dim of {where}, over tp({tp}),", dim)
    return FlatParameter(found["name"], tuple(shape), dim, _whole(found["offset"], f"offset of {where}"))


def _apart(spans: list[tuple[int, int, str]]) -> None:
    spans = sorted(spans)
    for (_, stop, a), (start, _, b) in pairwise(spans):
        if stop > start:
            raise CinemeshError(f"{quoted(a)} ends at element {stop}, behind the start of {quoted(b)} at {start}")


def _file(value: object, where: str, layout: Layout, one_part: dict[str, str] | None) -> ShardFile:
    """``one_part``: dtypes by state, where a file is its part, as in the format before."""
    kinds: dict[str, Any] = {"name": str, "size_bytes": int, "header": str}
    kinds |= {"at": dict, "start": int, "stop": int, "blocks": dict} if one_part else {"parts": list}
    found = exactly(value, where, kinds, remedy=RESTORE)
    size = _whole(found["size_bytes"], f"size_bytes of {where}")
    file_name(found["name"], f"{where}: name")
    if one_part:
        rows = [{key: found[key] for key in ("at", "start", "stop", "blocks")} | {"begin": 0}]
    else:
        rows = found["parts"]
    parts = [_part(row, f"part {i} of {where}", layout) for i, row in enumerate(rows)]
    if one_part:
        item = sum(TORCH_DTYPES[dtype].itemsize for dtype in one_part.values())
        parts = [replace(part, begin=size - item * (part.stop - part.start)) for part in parts]
    if not parts:
        raise _wrong(f"parts of {where}", [])
    return ShardFile(found["name"], size, found["header"], tuple(parts))


def _part(value: object, where: str, layout: Layout) -> ShardPart:
    kinds = {"begin": int, "at": dict, "start": int, "stop": int, "blocks": dict}
    found = exactly(value, where, kinds, remedy=RESTORE)
    at = exactly(found["at"], f"{where}: at", dict.fromkeys(SHARDING, int), remedy=RESTORE)
    for axis, index in at.items():
        if _whole(index, f"{axis} of {where}") >= layout.degrees[axis]:
            raise _wrong(f"{axis} of {where}, of {layout.degrees[axis]},", index)
    for key in ("begin", "start", "stop"):
        _whole(found[key], f"{key} of {where}")
    return ShardPart(**found)


def _check_files(found: Manifest) -> None:
    """They hold every element of every shard once, and a digest of each block of it."""
    layout, spans = found.layout, dict[tuple[int, ...], list[tuple[int, int]]]()
    item = sum(map(found.item_bytes, found.states))
    for file in found.files:
        for part in file.parts:
            spans.setdefault(tuple(part.at[axis] for axis in SHARDING), []).append((part.start, part.stop))
            blocks = -(-(part.stop - part.start) // found.block_elements)
            good = part.blocks.keys() == found.states.keys() and all(
                isinstance(of, list) and len(of) == blocks and all(map(_is_digest, of)) for of in part.blocks.values()
            )
            if not good:
                raise _wrong(f"the digests of {file.name}", part.blocks)
        if not _is_digest(file.header):
            raise _wrong(f"the digests of {file.name}", file.header)
        ends = [(part.begin, part.begin + item * (part.stop - part.start), file.name) for part in file.parts]
        if file.header_bytes < 0 or max(end for _, end, _ in ends) != file.size_bytes:
            raise _wrong(f"the size of {file.name}", file.size_bytes)
        _apart(ends)
    names = {file.name for file in found.files}
    if len(names) < len(found.files):
        raise CinemeshError(f"{len(found.files)} files have {len(names)} names")
    shards = math.prod(layout.degrees.values())
    if len(spans) < shards:
        raise CinemeshError(f"its files are of {len(spans)} shards, not {shards}")
    for at, of in spans.items():
        ends = [0, *(end for span in sorted(of) for end in span), layout.flat_elements]
        if ends[::2] != ends[1::2]:
            shard = ", ".join(f"{axis} {index}" for axis, index in zip(SHARDING, at, strict=True))
            raise CinemeshError(f"the files of shard {shard} leave gaps or overlap")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None
