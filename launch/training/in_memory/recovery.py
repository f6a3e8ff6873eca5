"""After a loss: copies are looked for in the memory of all servers, agreed on, handed on, checked and loaded.

Collective throughout, as a start is. What is loaded was held against digests that were made when it was copied, and
that its other holders have too. Where any of it fails, the step before is tried, then storage.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from ....documents import exactly, parse_json
from ....errors import CinemeshError, in_a_line
from ....files import file_name
from ....model.runner import StepRunner
from ....parallel.runtime.comm import first_of, gather_at_first, hand_on
from ....parallel.runtime.mesh import coordinates
from ...cluster.environment import processes_here
from ...storage.places import Location, create_file, make_folder, read_file
from ..checkpoint.choosing import check_files, published
from ..checkpoint.manifest import COUNTERS, SAVED_STATES, read_manifest, step_of
from ..checkpoint.together import together
from .agreeing import Agreed, HeldCopy, steps_agreed
from .slots import (
    Header,
    Slots,
    copies_in,
    layout_digest,
    ranks_in,
    read_copy,
    read_header,
    remove_files,
    remove_stale,
    run_folder,
    shard_of,
    state_digests,
)

T = TypeVar("T")

RUN_FILE = ".memory.json"  # beside a run's checkpoints: by which name its copies go; `checkpoints/*` is these alone


@dataclass(frozen=True)
class Recovered:
    """What a run goes on from: the states of ``step`` are loaded. ``note`` as a checkpoint's."""

    step: int
    note: dict[str, Any]


@dataclass(frozen=True)
class InStorage:
    """Checkpoints of a run: the step of the newest whole one, and of the newest of any; -1 and 0 for none."""

    whole: int
    any: int

    @classmethod
    def of(cls, directory: Location) -> InStorage:
        paths = published(directory)
        for path in paths:
            with suppress(CinemeshError):  # whoever reads it says why
                check_files(path, found := read_manifest(path))
                return cls(found.step, step_of(paths[0]) or 0)
        return cls(-1, max((step_of(path) or 0 for path in paths), default=0))


class CopiesInMemory:
    """The copies of a job's states in the memory of its servers, and this rank's of them."""

    def __init__(self, memory: Path, checkpoints: Location, runner: StepRunner, store: Store | None) -> None:
        """Ask for memory. Collective.

        ``memory``: a folder of each server, of a file system in memory. ``store``: where ranks of this round meet, None
        for a run of one. Raises CinemeshError, on all ranks, where there is not enough.
        """
        self.checkpoints, self.runner, self.store = checkpoints, runner, store
        self.rank = runner.mesh.rank if runner.mesh else 0
        run = self._said(together(runner.mesh, lambda: None if self.rank else _run_name(checkpoints)))
        assert run is not None
        self.folder = together(runner.mesh, lambda: run_folder(memory, run))
        self.slots: Slots | None = None
        self.since = 0  # the newest checkpoint in storage

    def recover(self) -> tuple[Recovered | None, list[str]]:
        """Load the newest step that all shards have a good holder of, if storage has none as new. Collective.

        What there is to say of steps that were passed over, too. The states are undefined where there is none.
        """
        found, said = None, list[str]()
        for agreed in self._agreed(said):
            try:
                found = Recovered(agreed.step, self._load(agreed))
                break
            except CinemeshError as error:
                said.append(f"step {agreed.step}, in the servers' memory: {error.problem}")
        together(self.runner.mesh, lambda: None)  # nobody reads another's any more
        self.slots = together(self.runner.mesh, self._begin)
        return found, said

    @property
    def written(self) -> bool:
        """Whether this rank's newest copy is whole."""
        return self.slots is None or self.slots.written

    def take(self, note: dict[str, Any]) -> None:
        """Copy this rank's states: when all ranks have ``written`` theirs, or a step may be left without holders.

        One that cannot be written is told, and the run goes on: it has that of another rank, or storage.
        """
        assert self.slots is not None
        self.slots.take(note, self.since)

    def forget(self) -> None:
        """No copy of any rank is one any more: the run goes back in storage. Collective."""
        together(self.runner.mesh, lambda: self.slots.forget() if self.slots else None)
        self.since = 0

    def close(self) -> None:
        """Give the memory back: the run has ended, and what it reached is in storage."""
        if self.slots is not None:
            self.slots.close()

    # -- a recovery ---------------------------------------------------------------------------------------------------

    def _agreed(self, said: list[str]) -> Sequence[Agreed]:
        """Steps that will do, the newest first, on every rank."""
        runner = self.runner
        mine = [_held(self.rank, path, header) for path, header in self._reached()]
        held: Any = gather_at_first(mine) if runner.mesh else [mine]

        def compare() -> tuple[list[Agreed], list[str], int] | None:
            if held is None:
                return None
            storage = InStorage.of(self.checkpoints)
            newer = [one for of in held for one in of if one.step > storage.whole and one.since <= storage.any]
            shards = [shard_of(coordinates(runner.plan, rank)) for rank in range(runner.plan.world_size)]
            return *steps_agreed(newer, shards), storage.any

        agreed, refused, self.since = self._said(together(runner.mesh, compare)) or ([], [], 0)
        said += [f"{why}, in the servers' memory" for why in refused]
        return agreed

    def _reached(self) -> list[tuple[Path, Header]]:
        """Copies of this server that are this rank's to offer: each is one rank's, its own as a rule."""
        layout = layout_digest(self.runner)
        found = (copy for rank in self._ranks_of_files() for copy in copies_in(self.folder, rank))
        return [(path, header) for path, header in found if header.layout == layout]

    def _ranks_of_files(self) -> list[int]:
        """Whose files of this server are this rank's to look after: its own, unless servers took other numbers."""
        local = processes_here(1)
        return [rank for rank in ranks_in(self.folder) if rank % local == _local_rank()]

    def _load(self, agreed: Agreed) -> dict[str, Any]:
        """The states of a step; the run's note. Raises CinemeshError, on all ranks, where a copy is not as it was."""
        runner, states = self.runner, [self.runner.buffers[state].view(-1) for state in SAVED_STATES]
        note = self._note(agreed)
        dtype, elements = states[0].dtype, states[0].numel()

        def memory() -> dict[int, Tensor]:
            """By what is handed on: what this rank gives, or a place for what it gets."""
            return {
                number: read_copy(self.folder / one.name, elements, dtype)
                if one.source == self.rank
                else torch.empty(len(states), elements, dtype=dtype)
                for number, one in enumerate(agreed.handed_on)
                if self.rank in (one.source, *one.ranks)
            }

        held = together(runner.mesh, memory)
        groups = [[one.source, *(rank for rank in one.ranks if rank != one.source)] for one in agreed.handed_on]
        if self.store is not None:
            between = {number: tensor for number, tensor in held.items() if len(groups[number]) > 1}
            hand_on(PrefixStore(f"memory/{agreed.step}", self.store), groups, between)
        mine = next(held[n] for n, one in enumerate(agreed.handed_on) if self.rank in one.ranks)

        def check() -> None:
            for state, known, there in zip(SAVED_STATES, agreed.digests[shard_of(runner.coordinates)],
                                           state_digests(list(mine)), strict=True):  # fmt: skip
                if known != there:
                    raise CinemeshError(f"rank {self.rank}: {state} is not what was copied")

        together(runner.mesh, check)
        for state, values in zip(states, mine, strict=True):
            state.copy_(values)
        runner.buffers[COUNTERS].copy_(torch.tensor([agreed.step, agreed.updates]))
        return note

    def _note(self, agreed: Agreed) -> dict[str, Any]:
        """The run's, as one rank has it."""
        by, name = agreed.note_of

        def read() -> dict[str, Any] | None:
            if self.rank != by:
                return None
            header = read_header((self.folder / name).with_suffix(".json"))
            if header is None:
                raise CinemeshError(f"rank {by}: its copy is there no more")
            return header.note

        return self._said(together(self.runner.mesh, read)) or {}

    def _said(self, value: T | None) -> T | None:
        """What one rank has, on every rank."""
        return first_of(value) if self.runner.mesh else value

    def _begin(self) -> Slots:
        """Room for this rank's copies; what ranks that are elsewhere now have left here goes."""
        for rank in self._ranks_of_files():
            if rank != self.rank:
                remove_files(self.folder, rank)
        if _local_rank() == 0:
            remove_stale(self.folder)
        return Slots(self.folder, self.runner)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _held(by: int, path: Path, header: Header) -> HeldCopy:
    note = hashlib.sha256(json.dumps(header.note, sort_keys=True).encode()).hexdigest()
    return HeldCopy(by, path.name, header.step, header.updates, header.shard, header.digests, note, header.since)


def _run_name(checkpoints: Location) -> str:
    """Drawn when a run first asks for it. Raises CinemeshError where it cannot be kept."""
    path = checkpoints / RUN_FILE
    try:
        make_folder(checkpoints)
        create_file(path, json.dumps({"run": uuid.uuid4().hex}).encode())
        found = parse_json(read_file(path).decode(), f"{path}", "remove it")
        return file_name(exactly(found, f"{path}", {"run": str}, remedy="remove it")["run"], f"{path}: run")
    except (OSError, ValueError) as error:
        raise CinemeshError(f"cannot keep {path}: {in_a_line(error)}", remedy="see to its folder") from error
