"""The compute half of ``cinemesh calibrate``: seconds of every record of small steps on this machine.

One-block steps of small models are run without their communication, every process of the job running the same at the
same time: processes share the cores of a machine, and do so in a training step. A record's own time is that of its
thread; the level of all is set by the time of the whole step, in which the others had their turn.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from ...kernels.ops import OPS
from ...kernels.registry import kernels_for
from ...model.config import Encoder, ModelConfig
from ...model.inputs import BatchShape
from ...model.step import build_step
from ...parallel.ir.plan import Plan
from ...parallel.passes.pipeline import prepare
from ...parallel.runtime.alone import Silent
from ...parallel.runtime.comm import barrier
from ...parallel.runtime.executor import Executor
from ...parallel.runtime.frozen import Frozen
from ...parallel.runtime.mesh import coordinates
from ...perf_model.calibration.calibrate import TimedSamples

DTYPE = "float32"
REPETITIONS = 6  # of a program


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


def _together() -> None:
    if torch.distributed.is_initialized():
        barrier()
