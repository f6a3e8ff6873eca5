"""``cinemesh calibrate``: measure this machine, or this torchrun job, and write a cluster file.

Compute is measured on one-block steps of small models, without their communication, every process of the job running
the same at the same time: processes share the cores of a machine, and do so in a training step. A record's own time is
that of its thread; the level of all is set by the time of the whole step, in which the others had their turn.
Collectives are measured where a step has them, behind some compute, as ``parallel/runtime/comm.py`` issues them.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import typer

from ...errors import CinemeshError
from ...kernels.ops import OPS
from ...kernels.registry import kernels_for
from ...model.config import Encoder, ModelConfig
from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ...parallel.passes.pipeline import prepare
from ...parallel.runtime.alone import Silent
from ...parallel.runtime.comm import BoundCollective, Communicator, barrier, gather_objects, summing
from ...parallel.runtime.executor import Executor
from ...parallel.runtime.frozen import Frozen
from ...parallel.runtime.mesh import Mesh, coordinates
from ...perf_model.calibration.calibrate import Machine, TimedSamples, fit, residuals, write
from ..cluster.processes import joined, launch, launched, rank_main, world_size

DTYPE = "float32"
PROCESSES = 4  # unless told
REPLICAS: Axes = ("dp_replicate",)
REPETITIONS = 6  # of a program
ROUNDS = 3  # of a collective's loop
PASSES = 2  # over all collectives: what disturbs one is gone in the next
LOOP = 8  # collectives in one, where they are fast
LOOP_S = 0.2
SIZES = (2**12, 2**16, 2**19, 2**21, 2**22)  # bytes of the full side of a collective
LONG = 4.0  # times the compute before it: a collective beside which compute is timed
MOST_SLOWDOWN = 10.0
WORK_S = 1e-3  # compute before each collective, of one process that has a core to itself


@dataclass(frozen=True)
class TimedCase:
    """A one-block model and the degrees whose local shapes are run, without their communication."""

    config: ModelConfig
    batch: BatchShape
    plan: Plan


def _case(
    width: int, heads: int, ffn: int, latent: tuple[int, int, int], samples: int, tp: int = 1, cp: int = 1
) -> TimedCase:
    config = ModelConfig("calibration", 1, width, heads, ffn, (Encoder("text", 64, 24),), position_lengths=(4, 32, 32))
    plan = Plan(tp=tp, cp=cp, dtype=DTYPE, recompute="none", prefetch=0)
    return TimedCase(config, BatchShape(samples, latent), plan)


# Head dims 16, 32, 64 and 128, the smallest with short and long rows; products from slim to square; flat shards of
# 0.1 to 10 MB.
CASES = (
    _case(96, 6, 256, (1, 16, 16), 2),
    _case(128, 8, 384, (4, 32, 32), 2, cp=2),
    _case(128, 4, 384, (2, 16, 16), 4),
    _case(160, 5, 448, (2, 16, 16), 8, tp=1),
    _case(224, 7, 640, (4, 16, 16), 8, cp=4),
    _case(320, 10, 896, (2, 32, 32), 2, tp=2),
    _case(384, 6, 1024, (2, 16, 16), 2),
    _case(512, 4, 1408, (2, 16, 16), 2),
)


# -- one rank ---------------------------------------------------------------------------------------------------------


def _together() -> None:
    if torch.distributed.is_initialized():
        barrier()


def measure_compute(case: TimedCase, repetitions: int = REPETITIONS) -> tuple[TimedSamples, float]:
    """Seconds of this thread in every compute record of a case, and how many times as long the step takes.

    Every process of the job runs it at the same time.
    """
    program = prepare(build_step(case.config, case.plan, case.batch), backend="gloo")
    executor = Executor(program, coordinates(case.plan, 0), Silent(), "cpu", kernels_for("cpu"))
    generator = torch.Generator().manual_seed(0)
    for tensor in (executor.arena[: executor.arena.numel() // 4 * 4].view(torch.float32), *executor.buffers.values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    frozen = Frozen(executor)
    frozen.record()
    stamps = [0.0] * (len(program.ops) + 1)

    def note(i: int) -> None:
        stamps[i + 1] = time.thread_time()

    own: list[list[float]] = [[] for _ in program.ops]
    whole: list[float] = []
    _together()
    for repetition in range(repetitions + 2):
        start, stamps[0] = time.perf_counter(), time.thread_time()
        frozen.run(note)
        if repetition >= 2:
            whole.append(time.perf_counter() - start)
            for i, seconds in enumerate(own):
                seconds.append(stamps[i + 1] - stamps[i])
    medians = [statistics.median(seconds) for seconds in own]
    level = statistics.median(whole) / sum(medians)
    _together()
    samples = TimedSamples()
    for op, seconds in zip(program.ops, medians, strict=True):
        if op.kind in OPS:
            samples.add_op(program, op, seconds)
    return samples, level


def measure_collectives(sizes: tuple[int, ...] = SIZES) -> TimedSamples:
    """Seconds of every collective by kind, bytes and group, beyond the compute that goes before it."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    samples = TimedSamples()
    compute = _some_compute()
    hosts = gather_objects(platform.node())
    crowd = hosts.count(platform.node()) / len(os.sched_getaffinity(0))  # processes a core
    for mesh, axes, ranks, servers in [*_groups(world, local)] * PASSES:
        comm = Communicator(mesh)
        for kind in ("all_gather", "reduce_scatter", "all_reduce"):
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
    times = max(1, round(WORK_S / _slowest(own)))
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
    times = max(1, min(LOOP, int(LOOP_S / _slowest(loop(1, communicate=True)[0]))))
    pairs = [(loop(times, communicate=True), loop(times, communicate=False)) for _ in range(ROUNDS)]
    (both, both_own), (alone, alone_own) = (
        (min(seconds for seconds, _ in side), min(own for _, own in side)) for side in zip(*pairs, strict=True)
    )
    seconds, own = (both - alone) / times, (both_own - alone_own) / times
    return _Added(_slowest(seconds), _slowest(own), _slowest(alone / times), times)


def _least(work: Callable[[], object]) -> float:
    return _slowest(min(_timed(work) for _ in range(ROUNDS)))


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


def _slowest(seconds: float) -> float:
    """Of all ranks: what they decide by it, they decide alike."""
    everyones: Any = gather_objects(seconds)
    return max(everyones)


def _groups(world: int, local: int) -> Iterator[tuple[Mesh, Axes, int, int]]:
    """(mesh, axes, ranks, servers) of the groups to measure: all ranks, across servers, and within a server."""
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
    """Everything, on every rank of the job; the samples of all, on rank 0."""
    compute = [measure_compute(case) for case in CASES]
    mine = (
        TimedSamples.joined(samples for samples, _ in compute),
        measure_collectives(),
        [level for _, level in compute],
    )
    everyones: Any = gather_objects(mine)
    if torch.distributed.get_rank() > 0:
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


def _work(out: Path) -> None:
    world = int(os.environ["WORLD_SIZE"])
    with joined(Plan(dp_replicate=world)) as place:
        if place.device != "cpu":
            raise CinemeshError(
                "calibrate measures CPU processes",
                remedy="for GPUs use a shipped cluster file, or hide them: CUDA_VISIBLE_DEVICES= cinemesh calibrate",
            )
        samples = measure()
        if samples is not None:
            machine = machine_of(out.stem)
            cluster = write(fit(samples, machine), machine, out)
            typer.echo(f"{out}: {machine.about}. Mean error of its prices over what was measured:")
            for name, error in residuals(samples, cluster).items():
                typer.echo(f"  {name:34}{error:8.1%}")


def run(*, out: Path, nproc: int | None) -> int:
    """Measure and write ``out``; the exit code. Raises CinemeshError for a file that cannot be written."""
    if out.suffix not in (".yaml", ".yml"):
        raise CinemeshError(f"--out {out}: a cluster file ends in .yaml", remedy="write for example --out local.yaml")
    if not out.parent.is_dir():
        raise CinemeshError(f"--out {out}: there is no folder {out.parent}", remedy="make it first")
    if launched():
        world_size(nproc)
        return rank_main(lambda: _work(out))
    return launch(nproc or PROCESSES, _work, out)
