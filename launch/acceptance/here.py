"""What a job of a stage is given, on every rank, in a process of its own."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from ...documents import read_json
from ...files import atomic_file
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import first_of
from ...parallel.runtime.mesh import Mesh
from ...perf_model.acceptance import DEVICE
from ..cluster.environment import processes_here
from ..cluster.meeting import job_store
from ..cluster.processes import Joined, joined
from ..options import Device

FAULTS, SAID = "faults", "said"  # keys of what is found: what is not well, and all of it in a line


@dataclass(frozen=True)
class AcceptanceOptions:
    """The command's options. ``cluster``: whose prices stand beside what is measured; None: that of the card."""

    out: Path
    seconds: float
    device: Device
    cluster: str | None


@dataclass
class Here:
    """One rank in one job. Only rank 0's findings count: they are in ``file``, written anew by every ``note``.

    ``within``: the part of the store that is this job's.
    """

    asked: AcceptanceOptions
    within: str
    store: Store
    rank: int
    world: int
    until: float
    file: Path
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, asked: AcceptanceOptions, within: str, seconds: float, file: Path) -> Here:
        """Raises CinemeshError when this rank cannot reach the store."""
        store, rank, world = job_store()
        found = read_json(file, "the findings", "") if file.exists() else {}
        return cls(asked, within, PrefixStore(within, store), rank, world, time.monotonic() + seconds, file, found)

    @property
    def local(self) -> int:
        """Ranks of this server."""
        return processes_here(self.world)

    def at(self, what: str) -> None:
        """Where this rank is now: what is told of it when it does not come back."""
        self.store.set(at_key(self.rank), what)
        print(what, flush=True)

    def note(self, **values: Any) -> None:
        """What was found so far, whatever happens next."""
        self.found |= values
        if self.rank == 0:
            with atomic_file(self.file) as unfinished:
                unfinished.write_text(json.dumps(self.found), encoding="utf-8")

    def fault(self, what: str) -> None:
        """The stage is not well, and goes on."""
        print(f"NOT well: {what}", flush=True)
        self.note(**{FAULTS: [*self.found.get(FAULTS, []), what]})

    @contextmanager
    def joined(self) -> Iterator[Joined]:
        """As a rank of a job of all ranks. Raises CinemeshError as :func:`processes.joined`."""
        self.at("joining the other ranks")
        with joined(Plan(dp_replicate=self.world), self.asked.device) as place:
            self.note(**{DEVICE: place.device.partition(":")[0]})
            yield place

    def time_for(self, share: float) -> bool:
        """Whether that share of the stage's seconds is left: rank 0 says so for all. Collective."""
        left = self.until - time.monotonic() > share * self.asked.seconds
        return bool(first_of(left if self.rank == 0 else None))


@contextmanager
def mesh_of(plan: Plan, place: Joined) -> Iterator[Mesh | None]:
    """Groups of another plan among the ranks of a job; closed also where what used it failed on every rank."""
    if place.mesh is None:
        yield None
        return
    gc.collect()  # what the last one's runner held of the device: the next may need it
    mesh = Mesh(plan)
    try:
        yield mesh
    finally:
        mesh.close()


def at_key(rank: int) -> str:
    return f"at/{rank}"
