"""Checkpoints: the flat states of all ranks as named global tensors, through torch.distributed.checkpoint (DCP).

A checkpoint does not know the plan that wrote it. Keys are ``state/parameter`` with the parameter's global shape:
``master/blocks.0.q``, ``exp_avg/...``, ``exp_avg_sq/...``, ``ema/...``; and ``counters``. See ``chunks.py``.

    directory/step-00000100/   cinemesh.json   .metadata   __0_0.distcp  __1_0.distcp ...
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from ...documents import mapping, parse_json, quoted, read_json
from ...errors import CinemeshError, in_a_line
from ...files import file_name
from ...model.config import ModelConfig, parameters
from ...model.runner import StepRunner
from ...parallel.ir.units import Units
from ...parallel.runtime.comm import first_of, gather_at_first
from ...parallel.runtime.mesh import Mesh
from .chunks import OTHER_MODEL, Chunk, ChunkLoadPlanner, Written, chunks, shown, write_chunks, write_metadata

STATES = ("master", "exp_avg", "exp_avg_sq", "ema")
COUNTERS = "counters"
# Raise it when names or what they mean change, or what the next step does with them. Before 2, draws of a sample did
# not depend on its place in the batch, and the EMA's decay did not warm up: such weights can be read, but no run goes
# on from them.
FORMAT = 2
FOLDER = "checkpoints"  # where a run keeps them, below its directory
MANIFEST = "cinemesh.json"
METADATA = ".metadata"  # DCP writes it last
_NAME = re.compile(r"step-(\d{8,})")

T = TypeVar("T")


# -- saving -----------------------------------------------------------------------------------------------------------


def free_bytes(path: Path) -> int:
    """Bytes that may still be written to the file system of ``path``."""
    return shutil.disk_usage(path).free


def save(directory: Path, runner: StepRunner, *, keep: int = 2, note: dict[str, Any] | None = None) -> Path:
    """Write ``directory/step-NNNNNNNN``, on all ranks together, and prune to the ``keep`` newest.

    ``directory`` is one that all ranks share. The final name appears only when every rank has written its part.
    ``note`` (JSON values) is kept in the manifest. Raises CinemeshError, on all ranks, when it does not fit or cannot
    be written.
    """
    assert keep >= 1
    step = runner.steps_done
    final = directory / f"step-{step:08d}"
    partial = directory / f".{final.name}.partial"
    rank = runner.mesh.rank if runner.mesh else 0
    first = rank == 0

    def prepare() -> list[Chunk]:
        if first:
            with _reported("write", final):
                _make_room(directory, partial, runner)
        mine: list[Chunk] = []
        if runner.coordinates["dp_replicate"] == 0:
            for state in STATES:
                mine += chunks(state, runner.buffers[state], runner.units, runner.coordinates)
        if first:
            counters = runner.buffers[COUNTERS]
            mine.append(Chunk(COUNTERS, tuple(counters.shape), (0,), counters))
        return mine

    def write() -> Written:
        try:
            return write_chunks(partial, mine, rank)
        except Exception as error:  # of a full disk torch's writer says so with a RuntimeError
            raise _failed("write", final, error, f"rank {rank}: ") from error

    def publish() -> None:
        if first:
            with _reported("write", final):
                write_metadata(partial, written)
                _write_manifest(partial, runner, step, note or {})
                _rename(partial, final)
                for old in _complete(directory)[:-keep]:
                    if old != final:
                        _remove(old)

    try:
        mine = _together(runner.mesh, prepare)
        ours = _together(runner.mesh, write)
        written: Any = [ours] if runner.mesh is None else gather_at_first(ours)
        _together(runner.mesh, publish)
    except CinemeshError:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _make_room(directory: Path, partial: Path, runner: StepRunner) -> None:
    """Remove what broken saves left behind, compare free bytes with those needed, make the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    for broken in directory.glob(".step-*"):
        shutil.rmtree(broken)
    item = runner.buffers[STATES[0]].element_size()
    elements = sum(row.elements for row in parameters(runner.config))
    needed, free = elements * item * len(STATES), free_bytes(directory)
    if free < needed:
        raise CinemeshError(
            f"a checkpoint needs {needed:,} bytes ({elements:,} parameters * {item * len(STATES)} bytes), but "
            f"{directory} has {free:,} free",
            remedy="free some space or write to another file system",
        )
    partial.mkdir()


def _write_manifest(folder: Path, runner: StepRunner, step: int, note: dict[str, Any]) -> None:
    manifest = {
        "format": FORMAT,
        "step": step,
        "updates": runner.updates_done,
        "model": asdict(runner.config),
        "plan": runner.plan.to_dict(),
        "torch": torch.__version__,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "note": note,
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _rename(partial: Path, final: Path) -> None:
    if final.exists():  # the same step again, after resuming from an earlier one
        _remove(final)
    os.rename(partial, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name survives a power failure
    finally:
        os.close(folder)


def _remove(folder: Path) -> None:
    """Give up the final name first: a checkpoint that is half removed is none."""
    doomed = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


# -- loading ----------------------------------------------------------------------------------------------------------


def latest(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None where none was ever written.

    Raises CinemeshError where there are only incomplete ones: that is no reason to begin from step 0.
    """
    complete = _complete(directory)
    if not complete and (broken := incomplete(directory)):
        raise CinemeshError(
            f"checkpoint {broken[-1]} is not whole ({_lacks(broken[-1])}) and there is no other",
            remedy="restore it, or move it away to begin from step 0",
        )
    return complete[-1] if complete else None


def incomplete(directory: Path) -> list[Path]:
    """Step folders later than the newest complete checkpoint that are not whole, by step."""
    complete = _complete(directory)
    named = _named(directory)
    return named[named.index(complete[-1]) + 1 :] if complete else named


def _named(directory: Path) -> list[Path]:
    """Step folders, by step."""
    named = [(int(match[1]), path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named)]


def _complete(directory: Path) -> list[Path]:
    return [path for path in _named(directory) if not _lacks(path)]


def _lacks(path: Path) -> str:
    """``no .metadata``, or nothing for a checkpoint that has all that is written last."""
    return ", ".join(f"no {name}" for name in (METADATA, MANIFEST) if not (path / name).is_file())


def manifest(path: Path) -> dict[str, Any]:
    """``step``, ``updates``, ``model``, ``plan``, ``torch``, ``files``, ``note`` of a checkpoint whose files are there.

    Raises CinemeshError when it is missing, incomplete, truncated or of another format.
    """
    found = read_json(path / MANIFEST, "the manifest", "name a complete checkpoint, a step-* folder of a run")
    where = f"checkpoint {path} is damaged: its manifest"
    written_by = found.get("format") if isinstance(found, dict) else found
    if type(written_by) is not int or not 1 <= written_by <= FORMAT:
        raise CinemeshError(
            f"checkpoint {path} has format {quoted(written_by)}, this version reads 1 to {FORMAT}",
            remedy=_OTHER_VERSION,
        )
    found.setdefault("updates", found.get("step"))  # format 1 does not tell the steps whose update was skipped
    mapping(found, where, _MANIFEST, required=_MANIFEST, remedy=_DAMAGED)
    for key, kind in _MANIFEST.items():
        if not isinstance(found[key], kind):
            raise CinemeshError(f"{where} has the {key} {quoted(found[key])}", remedy=_DAMAGED)
    encoders = found["model"].get("encoders")
    if not isinstance(encoders, list) or not all(
        isinstance(e, dict) and {"name", "width"} <= e.keys() for e in encoders
    ):
        raise CinemeshError(f"{where} has the encoders {quoted(encoders)}", remedy=_DAMAGED)
    for name, size in found["files"].items():
        if name != METADATA:
            file_name(name, f"{where} lists a file that")
        if type(size) is not int:
            raise CinemeshError(f"{where} says that {name} has {quoted(size)} bytes", remedy=_DAMAGED)
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            state = "is missing" if there is None else f"has {there:,} bytes"
            raise CinemeshError(
                f"checkpoint {path} is damaged: {name} {state}, it was written with {size:,} bytes",
                remedy=_DAMAGED,
            )
    return found


_OTHER_VERSION = "read it with the version that wrote it, or train anew in another logging.directory"
_MANIFEST = {
    **dict.fromkeys(("format", "step", "updates"), int),
    **dict.fromkeys(("model", "plan", "files", "note"), dict),
    "torch": str,
}
_DAMAGED = "restore the file, or move this checkpoint away: the run then goes on from an earlier one, or from step 0"


def load(path: Path, runner: StepRunner) -> None:
    """Read a checkpoint, written under any plan, into the states and counters of ``runner``, bit by bit; collective.

    Raises CinemeshError, on all ranks, when the checkpoint is damaged, of another model, or of a format from which no
    run goes on; the states are then undefined.
    """

    def check() -> None:
        if runner.mesh is None or runner.mesh.rank == 0:
            check_model(path, runner.config)
            if (written := manifest(path)["format"]) < FORMAT:
                raise CinemeshError(
                    f"checkpoint {path} has format {written}, and steps since format {FORMAT} draw other noise: a "
                    "sample's draws depend on its place in the batch too",
                    remedy="end this run with the version that began it, or begin another in an empty "
                    "logging.directory; cinemesh sample takes these weights",
                )

    def read() -> None:
        counters = runner.buffers[COUNTERS]
        mine = [Chunk(COUNTERS, tuple(counters.shape), (0,), counters)]
        shapes = {COUNTERS: tuple(counters.shape)}
        for state in STATES:
            mine += chunks(state, runner.buffers[state].zero_(), runner.units, runner.coordinates)
            shapes |= _shapes(state, runner.units)
        _read(ChunkLoadPlanner(path, mine, shapes, cast=False))

    _together(runner.mesh, check)
    _together(runner.mesh, read)


def load_weights(path: Path, which: str, flat: Tensor, units: Units, coordinates: dict[str, int]) -> None:
    """Read the ``master`` or ``ema`` weights into one rank's flat shard, cast to its dtype. Each rank for itself.

    Raises CinemeshError as :func:`load` does.
    """
    assert which in ("master", "ema")
    manifest(path)
    _read(ChunkLoadPlanner(path, chunks(which, flat.zero_(), units, coordinates), _shapes(which, units), cast=True))


def _read(planner: ChunkLoadPlanner) -> None:
    """Each rank reads what it needs by itself: DCP's loading plans need no other rank."""
    with _reported("read", planner.path):
        dcp_load({}, storage_reader=FileSystemReader(planner.path), planner=planner, no_dist=True)


def _shapes(state: str, units: Units) -> dict[str, tuple[int, ...]]:
    return {f"{state}/{s.parameter.name}": s.parameter.shape for unit in units.units for s in unit.slots}


def check_model(path: Path, config: ModelConfig) -> None:
    """Raise CinemeshError when the checkpoint is damaged or its model differs, naming the first difference.

    Compared is all that fixes weights and their meaning: not the preset's name, nor how many text tokens there are.
    What a checkpoint does not say had its default when it was written.
    """
    defaults = {f.name: f.default for f in fields(ModelConfig) if f.default is not MISSING}

    def facts(model: dict[str, Any]) -> dict[str, Any]:
        model = parse_json(json.dumps(defaults | model), "the model", "")  # as the manifest has it: lists
        plain = {key: value for key, value in model.items() if key not in ("name", "encoders")}
        return plain | {f"width of text encoder {e['name']}": e["width"] for e in model["encoders"]}

    b = facts(asdict(config))
    try:
        a = facts(manifest(path)["model"])
    except (KeyError, TypeError) as error:
        raise CinemeshError(f"checkpoint {path} is damaged: {MANIFEST} describes no model", remedy=_DAMAGED) from error
    for key in (*b, *a):
        if a.get(key) != b.get(key):
            raise CinemeshError(
                f"checkpoint {path} is of another model: {key} is {shown(a.get(key))} there and "
                f"{shown(b.get(key))} here",
                remedy=OTHER_MODEL,
            )


# -- together ---------------------------------------------------------------------------------------------------------


def _together(mesh: Mesh | None, work: Callable[[], T]) -> T:
    """``work()`` on every rank; when it fails on one, every rank raises: the others its error as CinemeshError."""
    try:
        result = work()
    except Exception as error:
        if mesh is not None:
            first_of(error if isinstance(error, CinemeshError) else CinemeshError(str(error)))
        raise
    failure: CinemeshError | None = None if mesh is None else first_of(None)
    if failure is not None:
        raise failure
    return result


@contextmanager
def _reported(verb: str, path: Path) -> Iterator[None]:
    """What the file system or DCP raises becomes one CinemeshError. DCP's own is a BaseException of causes."""
    try:
        with warnings.catch_warnings():
            # A single process is meant to be one.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        cause = next((one for one in causes if isinstance(one, CinemeshError)), causes[0])
        if isinstance(cause, CinemeshError):
            raise cause from None
        raise _failed(verb, path, cause) from error
    except OSError as error:
        raise _failed(verb, path, error) from error


def _failed(verb: str, path: Path, cause: BaseException, where: str = "") -> CinemeshError:
    """One message, with the remedy for what the file system says."""
    number = cause.errno if isinstance(cause, OSError) else None
    if verb == "read":
        remedy = _DAMAGED
    elif number in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or write to another file system"
    elif number == errno.ENOENT:
        remedy = "somebody removed it meanwhile: give each run a logging.directory of its own"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "look to the permissions of its folder"
    else:
        remedy = "look to its file system"
    if isinstance(cause, UnpicklingError):  # torch would have the reader load whatever the file holds
        said = "its data are not as they were written"
    else:
        said = in_a_line(cause) if isinstance(cause, OSError) else f"{type(cause).__name__}: {in_a_line(cause)}"
    return CinemeshError(f"cannot {verb} checkpoint {path}: {where}{said}", remedy=remedy)
