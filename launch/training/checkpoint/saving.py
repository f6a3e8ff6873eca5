"""Saving: the states are copied to the host, and written behind training.

    begin (all ranks)    room is looked for; each rank copies its part of every state: the pause
    a thread a rank      writes its file, and digests of what it writes
    end (all ranks)      rank 0 collects the digests and writes the manifest, last: now there is a checkpoint

The final name appears by a rename, when the manifest is in the folder. Over dp_replicate every rank writes its own part
of the shard that they share.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import CinemeshError, in_a_line
from ....kernels.dtypes import TORCH_DTYPES
from ....model.config import ModelConfig, trained
from ....model.runner import StepRunner
from ....parallel.ir.plan import Plan
from ....parallel.ir.units import Units
from ....parallel.runtime.comm import gather_at_first
from ....parallel.runtime.host import pin
from . import writing
from .choosing import Keep, prune, remove
from .digests import digest
from .layout import SHARDING, Layout
from .manifest import MANIFEST, SAVED_STATES, Manifest, code_here, step_folder
from .together import together
from .writing import Written, write_part

NO_ROOM = "free some space or write to another file system"


def free_bytes(path: Path) -> int:
    """Bytes that may still be written to the file system of ``path``."""
    return shutil.disk_usage(path).free


def copy_bytes(units: Units) -> int:
    """Of the host, that a rank's copy of its part of the states takes."""
    item = TORCH_DTYPES[units.plan.stat_dtype].itemsize
    return -(-units.flat_elements // units.plan.dp_replicate) * item * len(SAVED_STATES)


def save(directory: Path, runner: StepRunner, *, keep: int = 2, note: dict[str, Any] | None = None) -> Path:
    """Write ``directory/step-NNNNNNNN`` and wait until it is there. Collective; see :class:`Saver`."""
    saver = Saver(directory, runner, Keep(keep))
    saver.begin(note or {})
    path = saver.end()
    saver.close()
    return path


def part_of(flat_elements: int, replicas: int, replica: int) -> tuple[int, int]:
    """(start, stop) of the elements of a shard that one of its replicas writes."""
    return flat_elements * replica // replicas, flat_elements * (replica + 1) // replicas


def check_room(folder: Path, what: str, elements: int, each: int, remedy: str = NO_ROOM) -> None:
    """Raise CinemeshError when ``folder`` has no room for so many parameters of ``each`` bytes."""
    needed, free = elements * each, free_bytes(folder)
    if free < needed:
        raise CinemeshError(
            f"{what} needs {needed:,} bytes ({elements:,} parameters * {each} bytes), but {folder} has {free:,} free",
            remedy=remedy,
        )


def described(
    config: ModelConfig, plan: Plan, states: Mapping[str, str], *, step: int, updates: int, note: dict[str, Any]
) -> dict[str, Any]:
    """Of a manifest all that does not wait for the files. ``states``: dtype by state."""
    return {
        "step": step,
        "updates": updates,
        "model": asdict(config),
        "plan": plan.to_dict(),
        "code": code_here(),
        "note": note,
        "states": dict(states),
        "block_elements": writing.BLOCK_ELEMENTS,
    }


def assembled(about: dict[str, Any], layout: Layout, written: list[Written]) -> Manifest:
    """The manifest of all files; ``about`` has what is not theirs."""
    sums = [sum(of) for of in zip(*(sums for _, sums in written), strict=True)]
    digests = {state: digest(of) for state, of in zip(about["states"], sums, strict=True)}
    return Manifest(**about, digests=digests, layout=layout, files=tuple(part for part, _ in written))


@dataclass(frozen=True)
class _Begun:
    """A save on its way: where its files are written, where they will be, and what of the manifest is known."""

    partial: Path
    final: Path
    about: dict[str, Any]  # of the manifest: all that does not wait for the files
    written: Future[Written]


class Saver:
    """Checkpoints of one run, into ``directory``, which all ranks share.

    A save that fails leaves nothing behind: the checkpoints before it stay.
    """

    def __init__(self, directory: Path, runner: StepRunner, keep: Keep) -> None:
        self.directory, self.runner, self.keep = directory, runner, keep
        self.rank = runner.mesh.rank if runner.mesh else 0
        self.layout = Layout.of(runner.units)
        self.start, self.stop = part_of(
            self.layout.flat_elements, runner.plan.dp_replicate, runner.coordinates["dp_replicate"]
        )
        self.memory: Tensor | None = None  # bytes of the host, asked for once; the copies lie there
        self.copies: dict[str, Tensor] = {}
        self.behind = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.begun: _Begun | None = None
        self.pruning: Future[None] | None = None  # of rank 0

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to do for the save on its way, if there is one."""
        return self.begun is None or self.begun.written.done()

    def begin(self, note: dict[str, Any]) -> None:
        """Copy the states, and start writing. Collective; none may be on its way.

        ``note`` (JSON values) is kept in the manifest. Raises CinemeshError, on all ranks, when there is no room.
        """
        assert self.begun is None
        runner = self.runner
        final = step_folder(self.directory, runner.steps_done)
        partial = final.with_name(f".{final.name}.partial")
        states: dict[str, str] = dict.fromkeys(SAVED_STATES, runner.plan.stat_dtype)
        counts = {"step": runner.steps_done, "updates": runner.updates_done}
        about = described(runner.config, runner.plan, states, note=note, **counts)

        def prepare() -> None:
            if self.memory is None:
                self._ask_for_memory()
            if self.rank == 0:
                try:
                    if self.pruning is not None:
                        self.pruning.result()
                    self._make_room(partial)
                except OSError as error:
                    raise write_failed(final, error) from error

        together(runner.mesh, prepare)
        self._copy()
        self.begun = _Begun(partial, final, about, self.behind.submit(self._write, partial))

    def end(self) -> Path:
        """Wait for all ranks' files and publish them. Collective. The checkpoint's folder.

        Raises CinemeshError, on all ranks, when they cannot be written.
        """
        assert self.begun is not None
        begun, self.begun = self.begun, None

        def written() -> Written:
            try:
                return begun.written.result()
            except OSError as error:
                raise write_failed(begun.final, error, f"rank {self.rank}: ") from error

        def finish() -> None:
            if parts is not None:
                try:
                    publish(assembled(begun.about, self.layout, parts), begun.partial, begun.final)
                except OSError as error:
                    raise write_failed(begun.final, error) from error

        try:
            mine = together(self.runner.mesh, written)
            parts: list[Any] | None = gather_at_first(mine) if self.runner.mesh else [mine]
            together(self.runner.mesh, finish)
        except CinemeshError:
            if self.rank == 0:
                shutil.rmtree(begun.partial, ignore_errors=True)
            raise
        if self.rank == 0:
            self.pruning = self.behind.submit(prune, self.directory, self.runner.steps_done, self.keep)
        return begun.final

    def close(self) -> None:
        """Wait for what is still removed."""
        self.behind.shutdown()

    def _make_room(self, partial: Path) -> None:
        """Remove what broken saves left behind, compare free bytes with those needed, make the folder."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for broken in self.directory.glob(".step-*"):
            shutil.rmtree(broken)
        item = TORCH_DTYPES[self.runner.plan.stat_dtype].itemsize
        elements = sum(row.elements for row in trained(self.runner.config))
        check_room(self.directory, "a checkpoint", elements, item * len(SAVED_STATES))
        partial.mkdir()

    def _ask_for_memory(self) -> None:
        dtype, elements = TORCH_DTYPES[self.runner.plan.stat_dtype], self.stop - self.start
        self.memory = torch.empty(len(SAVED_STATES) * elements * dtype.itemsize, dtype=torch.uint8)
        if self.runner.executor.device != "cpu":
            pin(
                self.memory,
                "the copy of the states that a checkpoint is written from",
                "start fewer processes a server",
            )
        self.copies = dict(zip(SAVED_STATES, self.memory.view(dtype).view(-1, elements), strict=True))

    def _copy(self) -> None:
        """This rank's part of every state."""
        for state, copy in self.copies.items():
            copy.copy_(self.runner.buffers[state].view(-1)[self.start : self.stop], non_blocking=True)
        if self.runner.executor.device != "cpu":
            torch.cuda.current_stream(self.runner.executor.device).synchronize()

    def _write(self, partial: Path) -> Written:
        """This rank's file, behind training."""
        at = {axis: self.runner.coordinates[axis] for axis in SHARDING}
        return write_part(partial / f"{self.rank:05d}.safetensors", self.layout, at, self.start, self.copies)


def publish(manifest: Manifest, partial: Path, final: Path) -> None:
    """Write the manifest of the files in ``partial``, and give the folder its name. Raises OSError."""
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.text())
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # the same step again, after resuming from an earlier one
        remove(final)
    os.rename(partial, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name survives a power failure
    finally:
        os.close(folder)


def write_failed(path: Path, cause: OSError, where: str = "") -> CinemeshError:
    """One message, with the remedy for what the file system says."""
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = NO_ROOM
    elif cause.errno == errno.ENOENT:
        remedy = "somebody removed it meanwhile: give each run a logging.directory of its own"
    elif cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "look to the permissions of its folder"
    else:
        remedy = "look to its file system"
    return CinemeshError(f"cannot write checkpoint {path}: {where}{in_a_line(cause)}", remedy=remedy)
