"""``cinemesh calibrate``: measure this machine, or this torchrun job, and write a cluster file.

Compute is measured by ``measure_compute.py``. Collectives are measured where a step has them, behind some compute, as
``parallel/runtime/comm.py`` issues them.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import typer

from ...errors import CinemeshError
from ...parallel.ir.collectives import COLLECTIVES
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import BoundCollective, Communicator, barrier, gather_objects, summing
from ...parallel.runtime.mesh import Mesh
from ...perf_model.calibration import links
from ...perf_model.calibration.calibrate import Machine, TimedSamples, fit, residuals, write
from ..cluster.environment import device_here, launched, processes_here, say_device, world_size
from ..cluster.processes import Joined, joined, launch, rank_main
from ..options import Device
from ..progress import Begin, each, progress
from ..written import command, wrote
from .links import show_links
from .measure_compute import CASES, measure_compute
from .measure_links import measure_links, slowest

PROCESSES = 4  # unless told
REPLICAS: Axes = ("dp_replicate",)
ROUNDS = 3  # of a collective's loop
PASSES = 2  # over all collectives: what disturbs one is gone in the next
LOOP = 8  # collectives in one, where they are fast
LOOP_S = 0.2
SIZES = (2**12, 2**16, 2**19, 2**21, 2**22)  # bytes of the full side of a collective
LONG = 4.0  # times the compute before it: a collective beside which compute is timed
MOST_SLOWDOWN = 10.0
WORK_S = 1e-3  # compute before each collective, of one process that has a core to itself


TimedGroup = tuple[Mesh, Axes, int, int]  # mesh, axes, ranks, servers


# -- one rank ---------------------------------------------------------------------------------------------------------


def measure_collectives(groups: Sequence[TimedGroup], begin: Begin, sizes: tuple[int, ...] = SIZES) -> TimedSamples:
    """Seconds of every collective by kind, bytes and group, beyond the compute that goes before it.

    ``begin`` is told of each of ``PASSES`` passes over the kinds of every group.
    """
    samples = TimedSamples()
    compute = _some_compute()
    hosts = gather_objects(platform.node())
    crowd = hosts.count(platform.node()) / len(os.sched_getaffinity(0))  # processes a core
    for mesh, axes, ranks, servers in [*groups] * PASSES:
        comm = Communicator(mesh)
        for kind in each(COLLECTIVES, begin, lambda kind, ranks=ranks: f"{kind} of {ranks} ranks"):
            for size in sizes:
                full, part = torch.zeros(size // 4), torch.zeros(size // 4 // ranks)
                ends = {"all_gather": (part, full), "reduce_scatter": (full, part), "all_reduce": (full, full)}
                staging = torch.zeros_like(full) if kind == "reduce_scatter" else None
                collective = comm.bind(kind, axes, *ends[kind], staging)
                key = (size, ranks, servers)
                added = _added(compute, collective)
                samples.add("collectives", kind, key, added.seconds)
                sum_s = 0.0 if staging is None else _least(summing(staging, part))
                samples.add("copying", kind, key, (added.own_s + sum_s) * crowd)
                if servers > 1 and added.seconds > LONG * added.compute_s:
                    samples.add("slowdown", kind, key, _slowdown(compute, collective, added, crowd))
    return samples


def _some_compute() -> Callable[[], None]:
    """Products that take one process about ``WORK_S``, as many on every rank."""
    square = torch.randn(192, 192)
    product = torch.empty_like(square)

    def compute(times: int) -> None:
        for _ in range(times):
            torch.mm(square, square, out=product)

    compute(50)
    own = min(_timed(lambda: compute(10)) for _ in range(20)) / 10
    times = max(1, round(WORK_S / slowest(own)))
    return lambda: compute(times)


@dataclass(frozen=True)
class _Added:
    """What a collective adds to the compute before it: seconds, and of gloo's threads on the cores. Alike on all ranks.

    This thread waits awake, which is no work. ``compute_s``: of that compute. ``times``: how often a loop runs both.
    """

    seconds: float
    own_s: float
    compute_s: float
    times: int


def _added(compute: Callable[[], None], collective: BoundCollective) -> _Added:
    """Of several loops, with the collective and without, the least disturbed."""

    def loop(times: int, *, communicate: bool) -> tuple[float, float]:
        start, others = time.perf_counter(), time.process_time() - time.thread_time()
        for _ in range(times):
            compute()
            if communicate:
                collective.issue()
                collective.wait()
        barrier()
        return time.perf_counter() - start, time.process_time() - time.thread_time() - others

    loop(1, communicate=True)
    times = max(1, min(LOOP, int(LOOP_S / slowest(loop(1, communicate=True)[0]))))
    pairs = [(loop(times, communicate=True), loop(times, communicate=False)) for _ in range(ROUNDS)]
    (both, both_own), (alone, alone_own) = (
        (min(seconds for seconds, _ in side), min(own for _, own in side)) for side in zip(*pairs, strict=True)
    )
    seconds, own = (both - alone) / times, (both_own - alone_own) / times
    return _Added(slowest(seconds), slowest(own), slowest(alone / times), times)


def _least(work: Callable[[], object]) -> float:
    return slowest(min(_timed(work) for _ in range(ROUNDS)))


def _slowdown(compute: Callable[[], None], collective: BoundCollective, added: _Added, crowd: float) -> float:
    """How much slower a collective moves while compute runs beside it for about half of its time.

    Compute loses the cores that copy; what then is not hidden of the time that compute took, the collective lost.
    """
    chunks = max(1, round(0.5 * added.seconds / added.compute_s))
    loops: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(added.times):
            collective.issue()
            for _ in range(chunks):
                compute()
            collective.wait()
        barrier()
        loops.append(time.perf_counter() - start)
    share = min(0.9, max(0.0, added.own_s * crowd / added.seconds))
    beside = chunks * added.compute_s / (1.0 - share)
    hidden = added.seconds + beside - min(loops) / added.times
    return min(MOST_SLOWDOWN, max(1.0, beside / hidden)) if hidden > 0.0 else MOST_SLOWDOWN


def _groups(world: int, local: int) -> Iterator[TimedGroup]:
    """The groups to measure: all ranks, across servers, and within a server."""
    servers = world // local
    yield Mesh(Plan(dp_replicate=world)), REPLICAS, world, servers
    if servers > 1:
        yield Mesh(Plan(tp=local, dp_replicate=servers)), REPLICAS, servers, servers
    inside = local if servers > 1 else local // 2
    if inside > 1:
        yield Mesh(Plan(tp=inside, dp_replicate=world // inside)), ("tp",), inside, 1


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure() -> TimedSamples | None:
    """Everything, on every rank of the job; the samples of all, on rank 0, which says what it does."""
    groups = [*_groups(int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))]
    rank = torch.distributed.get_rank()
    with progress("calibrating", len(CASES) + PASSES * len(groups) * len(COLLECTIVES), silent=rank > 0) as begin:
        compute = [measure_compute(case) for case in each(CASES, begin, lambda _: "a small step's compute")]
        mine = (
            TimedSamples.joined(samples for samples, _ in compute),
            measure_collectives(groups, begin),
            [level for _, level in compute],
        )
    everyones: Any = gather_objects(mine)
    if rank > 0:
        return None
    by_case = zip(*(levels for _, _, levels in everyones), strict=True)
    level = statistics.quantiles(map(statistics.median, by_case), n=4)[0]  # where other jobs disturbed least
    return TimedSamples.joined([samples.scaled(level) for samples, _, _ in everyones] + [c for _, c, _ in everyones])


def machine_of(name: str) -> Machine:
    """This machine, as a rank of the job sees it."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    servers = world // local
    about = f"{local} processes a server, {servers} x {cores} cores ({platform.machine()}), torch {torch.__version__}"
    return Machine(name, about, str(date.today()), local, servers, memory // local)


# -- the command ------------------------------------------------------------------------------------------------------


def _work(out: Path, device: Device, base: str) -> None:
    world = int(os.environ["WORLD_SIZE"])
    say_device(device, processes_here(world))
    with joined(Plan(dp_replicate=world), device) as place:
        if place.device != "cpu":
            _fit_links(place, base, out)
            return
        samples = measure()
        if samples is not None:
            machine = machine_of(out.stem)
            cluster = write(fit(samples, machine), machine, out)
            typer.echo(f"{out}: {machine.about}. Mean error of its prices over what was measured:")
            for name, error in residuals(samples, cluster).items():
                typer.echo(f"  {name:34}{error:8.1%}")
            wrote(out, command("plan", gpus=cluster.gpus, cluster=out, model="tiny-video", dtype="float32"))


def _fit_links(place: Joined, base: str, out: Path) -> None:
    """On GPUs: the links between them, measured; all else is the base's."""
    cluster = links.gpu_cluster(base)
    if place.mesh is None:
        raise CinemeshError(
            "calibrate measures links between GPUs, and this job has one",
            remedy="start it with torchrun on all; of one card take what kernels_gpu.py wrote: --card",
        )
    world = place.mesh.plan.world_size
    local = processes_here(world)
    whole = links.LinkTest("this job", COLLECTIVES[0], world, world // local, {})
    links.group_on(whole, cluster)  # refused before it begins
    tests = measure_links(world, local, place.device, "this job")
    if place.rank == 0:
        name = f"{world} of {torch.cuda.get_device_name(place.device)}, torch {torch.__version__}"
        source = links.LinkSource("job", f"cinemesh calibrate on {name}", str(date.today()))
        show_links(out, *links.write(tests, base, source, out))


def run(*, out: Path, nproc: int | None, device: Device, base: str) -> int:
    """Measure and write ``out``; the exit code. Raises CinemeshError for a device that is not here.

    ``base``: on GPUs, the cluster of all but the links.
    """
    if launched():
        world_size(nproc)
        return rank_main(lambda: _work(out, device, base))
    device_here(device, nproc or PROCESSES)
    return launch(nproc or PROCESSES, _work, out, device, base)
