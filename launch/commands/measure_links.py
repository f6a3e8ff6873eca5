"""Times of collectives on the GPUs of a job, as steps issue them: what ``cinemesh calibrate`` fits links to.

Groups lie as those of a plan do: 2, 4, ... neighbours within a server; one rank of each of 2, 8, ... servers, as shards
and replicas lie; and the whole job. All groups of a kind run at once, as in a step, and the slowest rank's time counts.
They are issued one by one or, where it is asked for, replayed in a CUDA Graph, as those of captured steps are.
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
from ..progress import Begin, progress

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
            found += measure_group(group, device, origin, sizes, begin=begin)
    return found


def measure_group(
    group: LinkGroups,
    device: str,
    origin: str,
    sizes: Sequence[int] = SIZES,
    *,
    captured: bool = False,
    begin: Begin = lambda _: None,
) -> list[LinkTest]:
    """The times of every kind of collective on one kind of group; collective over the job, the same on every rank.

    ``captured``: replayed in a CUDA Graph. ``begin`` is told of every kind.
    """
    found: list[LinkTest] = []
    with _mesh(group.plan) as mesh:
        for kind in COLLECTIVES:
            begin(f"{kind} of {group.ranks} ranks on {group.servers} servers")
            seconds = {size: _seconds(Communicator(mesh), kind, group, size, device, captured) for size in sizes}
            found.append(LinkTest(origin, kind, group.ranks, group.servers, seconds))
    return found


@contextmanager
def _mesh(plan: Plan) -> Iterator[Mesh]:
    mesh = Mesh(plan)
    yield mesh
    mesh.close()


def _seconds(comm: Communicator, kind: str, group: LinkGroups, size: int, device: str, captured: bool) -> float:
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
    run = loop
    if captured:
        graph = captured_loop(loop)
        comm.mesh.before_close.append(graph.reset)  # NCCL waits for graphs that hold its work
        run = graph.replay
        run()
    times: list[float] = []
    for _ in range(LOOPS):
        barrier()
        times.append(slowest(_timed(run, device) / REPEATED))
    return statistics.median(times)


def captured_loop(loop: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA Graph of it, as ``parallel/runtime/graph.py`` captures steps. All ranks capture together."""
    torch.cuda.synchronize()  # the watchdog of NCCL has no event left to query
    barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loop()
    return graph


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
