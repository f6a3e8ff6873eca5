"""Saving: the states are copied to the host, and written behind training.

    begin (all ranks)    room is looked for; each rank copies its part of every state: the pause
    a thread a rank      makes digests of its part, and writes its file, or the one of its server's ranks
    end (all ranks)      rank 0 collects the digests and writes the manifest, last: now there is a checkpoint

Over dp_replicate every rank writes its own part of the shard that they share.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ....errors import CinemeshError
from ....kernels.dtypes import TORCH_DTYPES
from ....model.config import trained
from ....model.runner import StepRunner
from ....parallel.runtime.comm import gather_at_first
from ...storage.places import AnyLocation, Location
from .assembling import assembled, described
from .choosing import Keep, prune
from .copies import FilesOf, HostCopies
from .layout import SHARDING, Layout
from .manifest import SAVED_STATES, step_folder
from .publishing import make_room, publish, remove, write_failed
from .together import together
from .writing import Written, write_part


def save(
    directory: AnyLocation,
    runner: StepRunner,
    *,
    keep: int = 2,
    note: dict[str, Any] | None = None,
    files: FilesOf = "rank",
) -> AnyLocation:
    """Write ``directory/step-NNNNNNNN`` and wait until it is there. Collective; see :class:`Saver`."""
    saver = Saver(directory, runner, Keep(keep), files)
    saver.begin(note or {})
    saver.end()
    saver.close()
    return step_folder(directory, runner.steps_done)


@dataclass(frozen=True)
class _Begun:
    """A save on its way: its folder, and what of the manifest is known."""

    folder: Location
    about: dict[str, Any]  # of the manifest: all that does not wait for the files
    written: Future[Written]


class Saver:
    """Checkpoints of one run, into ``directory``, which all ranks share: a file of each rank, or of each server.

    A save that fails leaves nothing behind: the checkpoints before it stay.
    """

    def __init__(self, directory: Location, runner: StepRunner, keep: Keep, files: FilesOf = "rank") -> None:
        self.directory, self.runner, self.keep = directory, runner, keep
        self.rank = runner.mesh.rank if runner.mesh else 0
        self.layout = Layout.of(runner.units)
        self.copies = HostCopies(runner, self.layout, files)
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
        folder = step_folder(self.directory, runner.steps_done)
        states: dict[str, str] = dict.fromkeys(SAVED_STATES, runner.plan.stat_dtype)
        counts = {"step": runner.steps_done, "updates": runner.updates_done}
        about = described(runner.config, runner.plan, states, note=note, **counts)

        def prepare() -> None:
            if self.rank == 0:
                try:
                    if self.pruning is not None:
                        self.pruning.result()
                    self._make_room(folder)
                except OSError as error:
                    raise write_failed(folder, error) from error

        together(runner.mesh, prepare)
        self._copy()
        self.begun = _Begun(folder, about, self.behind.submit(self._write, folder))

    def end(self) -> Location:
        """Wait for all ranks' files and publish them. Collective. The checkpoint's folder.

        Raises CinemeshError, on all ranks, when they cannot be written.
        """
        assert self.begun is not None
        begun, self.begun = self.begun, None

        def written() -> Written:
            try:
                return begun.written.result()
            except OSError as error:
                raise write_failed(begun.folder, error, f"rank {self.rank}: ") from error

        def finish() -> None:
            if parts is not None:
                try:
                    publish(assembled(begun.about, self.layout, parts), begun.folder)
                except OSError as error:
                    raise write_failed(begun.folder, error) from error

        try:
            mine = together(self.runner.mesh, written)
            parts: list[Any] | None = gather_at_first(mine) if self.runner.mesh else [mine]
            together(self.runner.mesh, finish)
        except CinemeshError:
            if self.rank == 0:
                with suppress(OSError, CinemeshError):
                    remove(begun.folder)
            raise
        if self.rank == 0:
            self.pruning = self.behind.submit(prune, self.directory, self.runner.steps_done, self.keep)
        return begun.folder

    def close(self) -> None:
        """Wait for what is still removed."""
        self.behind.shutdown()

    def _make_room(self, folder: Location) -> None:
        """Remove what broken saves left behind, compare free bytes with those needed, make the folder."""
        item = TORCH_DTYPES[self.runner.plan.stat_dtype].itemsize
        elements = sum(row.elements for row in trained(self.runner.config))
        make_room(self.directory, folder, elements, item * len(SAVED_STATES))

    def _copy(self) -> None:
        self.copies.take()

    def _write(self, folder: Location) -> Written:
        """This rank's part, behind training."""
        at, copies = {axis: self.runner.coordinates[axis] for axis in SHARDING}, self.copies
        return write_part(folder / copies.file_name, self.layout, at, copies.start, copies.states, copies.shelf)
