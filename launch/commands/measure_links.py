"""Times of collectives on the GPUs of a job, as steps issue them: what ``cinemesh calibrate`` fits links to.

Groups lie as those of a plan do: 2, 4, ... neighbours within a server; one rank of each of 2, 8, ... servers, as shards
and replicas lie; and the whole job. All groups of a kind run at once, as in a step, and the slowest rank's time counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...parallel.ir.collectives import COLLECTIVES
from ...parallel.ir.layout import WORLD, Axes
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import Communicator, barrier, gather_objects
from ...parallel.runtime.mesh import Mesh
from ...perf_model.calibration.links import LinkTest
from ..progress import progress

SIZES = tuple(2**power for power in range(16, 30, 3))  # bytes of the full side: 64 KiB to 256 MiB
SERVERS_STEP = 4  # from one number of servers to the next
REPEATED = 10  # one after the other in a loop, whose mean is one time
LOOPS = 5  # of which the median counts


@dataclass(frozen=True)
class LinkGroups:
    """Groups that lie alike: those over ``axes`` of a plan. Each has ``ranks``, as many on each of ``servers``."""

    plan: Plan
    axes: Axes
    ranks: int
    servers: int


def link_groups(world: int, local: int) -> Iterator[LinkGroups]:
    """What is measured on a job of ``world`` ranks, ``local`` a server; the whole job comes last."""
    servers, ranks = world // local, 2
    while ranks <= local and ranks < world:
        if local % ranks == 0:
            yield LinkGroups(Plan(tp=ranks, dp_replicate=world // ranks), ("tp",), ranks, 1)
        ranks *= 2
    spread = 2
    while local > 1 and spread <= servers:
        if servers % spread == 0:
            plan = Plan(tp=local, cp=spread, dp_replicate=servers // spread)
            yield LinkGroups(plan, ("cp",), spread, spread)
        spread *= SERVERS_STEP
    yield LinkGroups(Plan(dp_replicate=world), WORLD, world, servers)


def measure_links(world: int, local: int, device: str, origin: str, sizes: Sequence[int] = SIZES) -> list[LinkTest]:
    """The times of every group of :func:`link_groups`, the same on every rank. Rank 0 says what it does."""
    groups = list(link_groups(world, local))
    found: list[LinkTest] = []
    with progress("calibrating", len(groups) * len(COLLECTIVES), silent=torch.distributed.get_rank() > 0) as begin:
        for group in groups:
            with _mesh(group.plan) as mesh:
                for kind in COLLECTIVES:
                    begin(f"{kind} of {group.ranks} ranks on {group.servers} servers")
                    seconds = {size: _seconds(Communicator(mesh), kind, group, size, device) for size in sizes}
                    found.append(LinkTest(origin, kind, group.ranks, group.servers, seconds))
    return found


@contextmanager
def _mesh(plan: Plan) -> Iterator[Mesh]:
    mesh = Mesh(plan)
    yield mesh
    mesh.close()


def _seconds(comm: Communicator, kind: str, group: LinkGroups, size: int, device: str) -> float:
    """Of one collective, on the slowest rank."""
    full = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    part = full.new_zeros(size // 2 // group.ranks)
    whole = full[: part.numel() * group.ranks]
    ends = {"all_gather": (part, whole), "reduce_scatter": (whole, part), "all_reduce": (whole, whole)}
    staging = torch.zeros_like(whole) if kind == "reduce_scatter" and device == "cpu" else None
    collective = comm.bind(kind, group.axes, *ends[kind], staging)

    def loop() -> None:
        for _ in range(REPEATED):
            collective.issue()
            collective.wait()

    loop()  # connects
    times: list[float] = []
    for _ in range(LOOPS):
        barrier()
        times.append(slowest(_timed(loop, device) / REPEATED))
    return statistics.median(times)


def slowest(seconds: float) -> float:
    """Of all ranks: what they decide by it, they decide alike."""
    everyones: Any = gather_objects(seconds)
    return max(everyones)


def _timed(work: Callable[[], object], device: str) -> float:
    """Seconds that a device is at it."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)
