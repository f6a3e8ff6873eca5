"""A rank's copies of its states in memory of its server: two files, so that one is whole whenever a process ends.

    take      the older one's header goes; the states are copied, behind the steps before
    behind    digests are made, by a thread; the header is written, and appears whole: now there is a copy

The files lie in a file system in memory (``/dev/shm``), in a folder of the run. Their memory is asked for when a run
starts: one that is full later would end the process by a signal.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....documents import exactly, parse_json
from ....errors import CinemeshError, in_a_line
from ....files import atomic_file
from ....kernels.dtypes import TORCH_DTYPES
from ....model.runner import StepRunner
from ....parallel.runtime.host import pin
from ..checkpoint.copies import SLOTS
from ..checkpoint.digests import block_digest
from ..checkpoint.layout import SHARDING, Layout
from ..checkpoint.manifest import SAVED_STATES
from ..checkpoint.writing import MOST_THREADS

STALE_S = 3600.0  # since another run of this user wrote there: its job is not started again any more
_HEADER = re.compile(r"(\d{5,})-(\d)\.json")
_RUN = re.compile(r"[0-9a-f]{32}")  # what a run's folder is called


@dataclass(frozen=True)
class Header:
    """What a copy is of: the shard at coordinates ``shard``, as it was after ``step`` steps, under ``layout``.

    ``digests``: of each state's bytes. ``since``: the newest checkpoint in storage at that time, 0: none. ``note``: of
    the run, as a checkpoint's.
    """

    step: int
    updates: int
    shard: tuple[int, ...]
    layout: str
    digests: tuple[str, ...]
    since: int
    note: dict[str, Any]


def layout_digest(runner: StepRunner) -> str:
    """Of what decides where an element lies, and of the model and the dtype: copies of another are of no use."""
    told = [repr(Layout.of(runner.units)), runner.plan.stat_dtype, json.dumps(asdict(runner.config), default=str)]
    return hashlib.sha256("\n".join([*told, *SAVED_STATES]).encode()).hexdigest()


def shard_of(coordinates: dict[str, int]) -> tuple[int, ...]:
    return tuple(coordinates[axis] for axis in SHARDING)


class Slots:
    """The copies of one rank, ``folder/RANK-SLOT.bin`` with ``.json``: see the module."""

    def __init__(self, folder: Path, runner: StepRunner) -> None:
        """Ask for their memory. Raises CinemeshError where there is too little, and for a folder that is none."""
        self.folder, self.runner = folder, runner
        self.rank = runner.mesh.rank if runner.mesh else 0
        self.layout, self.shard = layout_digest(runner), shard_of(runner.coordinates)
        self.behind = ThreadPoolExecutor(1, thread_name_prefix="memory")
        self.writing: Future[None] | None = None
        dtype, elements = TORCH_DTYPES[runner.plan.stat_dtype], runner.buffers[SAVED_STATES[0]].numel()
        size = elements * dtype.itemsize * len(SAVED_STATES)
        self.memories: list[Tensor] = []
        steps: list[int] = []
        for slot in range(SLOTS):
            header = read_header(self.header(slot))
            if header is None or header.layout != self.layout:
                self.header(slot).unlink(missing_ok=True)
            steps.append(header.step if header else -1)
            memory = _mapped(self.data(slot), size)
            if runner.executor.device != "cpu":
                pin(memory, "copies of the states in memory", "set logging.memory_every to 0")
            self.memories.append(memory.view(dtype).view(len(SAVED_STATES), elements))
        self.next = (steps.index(max(steps)) + 1) % SLOTS

    def data(self, slot: int) -> Path:
        return self.folder / f"{self.rank:05d}-{slot}.bin"

    def header(self, slot: int) -> Path:
        return self.data(slot).with_suffix(".json")

    @property
    def written(self) -> bool:
        """Whether the copy that was taken last is whole."""
        return self.writing is None or self.writing.done()

    def take(self, note: dict[str, Any], since: int) -> None:
        """Copy the states as they are now, once the copy before is whole."""
        self.finish()
        runner, slot = self.runner, self.next
        self.header(slot).unlink(missing_ok=True)
        for state, copy in zip(SAVED_STATES, self.memories[slot], strict=True):
            copy.copy_(runner.buffers[state].view(-1), non_blocking=True)
        if runner.executor.device != "cpu":
            torch.cuda.current_stream(runner.executor.device).synchronize()
        about = Header(runner.steps_done, runner.updates_done, self.shard, self.layout, (), since, note)
        self.writing = self.behind.submit(self._publish, slot, about)
        self.next = (slot + 1) % SLOTS

    def finish(self) -> None:
        """Wait until the copy that was taken last is whole; one that cannot be written is told, and ends no run."""
        writing, self.writing = self.writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, CinemeshError) as error:
            print(f"WARNING: rank {self.rank} has no copy of the states in memory: {in_a_line(error)}", file=sys.stderr)

    def forget(self) -> None:
        """No copy is one any more: of steps that are not the run's."""
        self.finish()
        for slot in range(SLOTS):
            self.header(slot).unlink(missing_ok=True)

    def close(self) -> None:
        """Give the memory back: the run has ended, or goes on elsewhere."""
        self.finish()
        self.behind.shutdown()
        remove_files(self.folder, self.rank)
        with suppress(OSError):  # other ranks' are there still, or another has done so
            self.folder.rmdir()

    def _publish(self, slot: int, about: Header) -> None:
        digests = state_digests(list(self.memories[slot]))
        with atomic_file(self.header(slot)) as part:
            part.write_text(json.dumps(asdict(about) | {"digests": digests}), encoding="utf-8")


def state_digests(states: list[Tensor]) -> list[str]:
    """Of flat CPU tensors."""
    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
        return list(threads.map(lambda values: block_digest(values.view(torch.uint8).numpy().data), states))


def _mapped(path: Path, size_bytes: int) -> Tensor:
    """A file of so many bytes, as it is there or new, all of which the file system has set aside.

    It is locked for as long as it is mapped, which tells others that somebody is there.
    """
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(opened, fcntl.LOCK_SH)
            os.ftruncate(opened, size_bytes)
            os.posix_fallocate(opened, 0, size_bytes)
            return torch.frombuffer(mmap.mmap(opened, size_bytes), dtype=torch.uint8)
        finally:
            os.close(opened)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CinemeshError(
            f"logging.memory_every: a copy of the states takes {size_bytes:,} bytes of {path.parent}: "
            f"{in_a_line(error)}",
            remedy="give it more (mount -o remount,size=...), name another with logging.memory_folder, or set "
            "logging.memory_every to 0",
        ) from error


# -- what lies in a folder --------------------------------------------------------------------------------------------


def run_folder(memory: Path, run: str) -> Path:
    """Where a run's copies lie, made as needed, for this user alone. Raises CinemeshError where it cannot be.

    ``memory`` may be anybody's: what is there in this user's name is not believed to be so.
    """
    own = memory / f"cinemesh-{os.getuid()}"
    folder = own / run
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = own.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise CinemeshError(
                f"logging.memory_folder: {own} is not this user's alone",
                remedy="have it removed, or name another folder",
            )
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CinemeshError(
            f"logging.memory_folder: cannot make {folder}: {in_a_line(error)}",
            remedy="name a folder of a file system in memory, or set logging.memory_every to 0",
        ) from error
    return folder


def remove_stale(folder: Path) -> None:
    """What other runs of this user left beside ``folder``, an hour ago or more, when they ended without a word."""
    for other in folder.parent.iterdir():
        if other == folder or not _RUN.fullmatch(other.name):
            continue
        with suppress(OSError):  # another rank is sooner
            files = [*other.iterdir()]
            last = max(path.stat().st_mtime for path in (other, *files))
            if time.time() - last > STALE_S and not any(map(_is_locked, files)):
                shutil.rmtree(other, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    with path.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def copies_in(folder: Path, rank: int) -> Iterator[tuple[Path, Header]]:
    """Whole copies that ranks of this number have left there, with their bytes' files."""
    for path in sorted(folder.glob(f"{rank:05d}-?.json")):
        if (header := read_header(path)) is not None and path.with_suffix(".bin").exists():
            yield path.with_suffix(".bin"), header


def remove_files(folder: Path, rank: int) -> None:
    """All that a rank of this number has left there; headers first."""
    for pattern in (f"{rank:05d}-?.json", f"{rank:05d}-?.bin", f".{rank:05d}-*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def ranks_in(folder: Path) -> list[int]:
    """Numbers of the ranks that have left files there."""
    return sorted({int(match[1]) for path in folder.iterdir() if (match := _HEADER.fullmatch(path.name))})


def read_header(path: Path) -> Header | None:
    """None where there is no copy, or none of this release."""
    try:
        found: dict[str, Any] = exactly(
            parse_json(path.read_text(encoding="utf-8"), "the header", ""), "the header", _KINDS, remedy=""
        )
    except (OSError, ValueError, CinemeshError):
        return None
    found["shard"], found["digests"] = tuple(found["shard"]), tuple(found["digests"])
    return Header(**found)


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("step", "updates", "since"), int),
    **dict.fromkeys(("shard", "digests"), list),
    "layout": str,
    "note": dict,
}


def read_copy(path: Path, elements: int, dtype: torch.dtype) -> Tensor:
    """[states, elements] of a copy, as it lies there. Raises CinemeshError for a file of another size."""
    try:
        with path.open("rb") as opened:
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CinemeshError(f"{path}: {in_a_line(error)}") from error
    expected = len(SAVED_STATES) * elements * dtype.itemsize
    if len(memory) != expected:
        raise CinemeshError(f"{path} has {len(memory):,} bytes, not {expected:,}")
    return torch.frombuffer(memory, dtype=dtype).view(len(SAVED_STATES), elements)
