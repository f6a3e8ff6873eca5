"""Stage 6: one real rank of the 30B step, without its peers: eager, captured, replayed, beside its price.

TP4 CP2 with full recompute, 12 of the 48 blocks. What other ranks would send is this rank's own part, copied
(``parallel/runtime/alone.py``): silent collectives would leave what is gathered to chance, and a card whose operands
are NaN or zeros draws less power and runs faster. The copies are priced too, under a hundredth of the step. The prices
are those of ``card.yaml``, made of stage 4's rates: same card, no network, so they must agree within ``GATE``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from benchmarks.on_card.cases import one_rank
from benchmarks.on_card.machine import driver
from benchmarks.on_card.stage import Here, cluster_of
from torch import Tensor

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.acceptance.steps import fill_inputs
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer
from cinemesh.model.weights import initial_values, probe_values
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.arena import place
from cinemesh.parallel.passes.device_memory import BLAS_STREAM_BYTES
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.runtime.alone import Alone
from cinemesh.perf_model.prices.compute import Compute

GATE = 0.08  # of the predicted step
LR = 1e-4
SEED = 0
STEPS = 3  # timed, of each kind; 1 in a smoke run
REPEATED = 0.3  # so activations are of order 1 in every block; at 1 the cross-attention of the second meets 5e10


def run(here: Here) -> None:
    case = one_rank(here.smoke)
    cluster = cluster_of(here, torch.cuda.get_device_name())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kernels = kernels_for(here.place, {"all": "triton"} if here.smoke else None)
    runner = StepRunner(
        case.config, case.plan, case.batch, Optimizer(), None, device=here.place, kernels=kernels, comm=Alone(case.plan)
    )
    runner.initialise(values)
    fill_inputs(runner, SEED)
    predicted_s = step_s(runner.program, Compute(cluster))
    runner.step(LR)  # compiles what is left to compile
    torch.cuda.synchronize()
    here.note(loss=runner.loss.item(), gradient_norm=runner.gradient_norm.item(), card=driver())

    steps = 1 if here.smoke else STEPS
    eager = [timed(runner) for _ in range(steps)]
    here.beside("eager", times(predicted_s), times(median(eager, 0), median(eager, 1)))
    lives = lifetimes(runner.program, workspace=runner.executor.workspace)
    own = lives.persistent_bytes + place(runner.program, lives).total_bytes
    peak = torch.cuda.max_memory_allocated() - before
    # The arena is exact; what kernels take beside it, and cuBLAS on its stream, is an upper bound.
    most = own + max(lives.workspace_bytes) + BLAS_STREAM_BYTES
    here.beside("peak", {"peak_bytes": most}, {"peak_bytes": peak})
    here.note(program_bytes=own, peak_as_predicted=here.smoke or own <= peak <= most)

    here.note(capture=runner.capture() or "captured")
    ran = eager
    if runner.replay is not None:
        fill_inputs(runner, SEED)  # the capture was made on samples of NaN
        runner.step(LR)
        ran = [timed(runner) for _ in range(steps)]
        here.beside("replay", times(predicted_s), times(median(ran, 0), median(ran, 1)))
    seconds = median(ran, 0)
    here.note(
        measured_over_predicted=round(seconds / predicted_s, 4),
        within_gate=here.smoke or abs(seconds / predicted_s - 1) <= GATE,
        finite=bool(runner.loss.isfinite() and runner.gradient_norm.isfinite()),
        behind=driver(),
    )
    runner.close()


def values(*given: Any) -> Tensor:
    """Initial values, but gates and what else begins at zero as small noise: products with zeros take less power.

    Products are smaller by ``REPEATED``: a weight of which every rank has the same part sums in step what would cancel.
    """
    drawn = 0.1 * probe_values(SEED)(*given) if given[0].init == "zeros" else initial_values(SEED)(*given)
    return drawn if given[0].init == "ones" else REPEATED * drawn


def step_s(program: Program, compute: Compute) -> float:
    """Every record of compute in turn, and the copies that stand for collectives."""
    seconds = 0.0
    for op in program.ops:
        if op.kind in OPS:
            seconds += compute.op_s(program, op)
        elif not op.is_wait and op.kind in ("all_gather", "reduce_scatter"):
            part = program.payload_bytes(op) / program.plan.size(op.axes)
            seconds += compute.stream_s(part + (program.payload_bytes(op) if op.kind == "all_gather" else part))
    return seconds


def timed(runner: StepRunner) -> tuple[float, float]:
    """Seconds of a step on the device, and of the host until it was launched."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    begun = time.perf_counter()
    runner.step(LR)
    host_s = time.perf_counter() - begun
    stop.record()
    stop.synchronize()
    return 1e-3 * start.elapsed_time(stop), host_s


def times(step_s: float, host_s: float | None = None) -> dict[str, float | None]:
    """Nothing predicts the host's."""
    return {"step_s": step_s, "host_s": host_s}


def median(found: list[tuple[float, float]], place: int) -> float:
    return statistics.median(pair[place] for pair in found)
