"""Steps run record by record, with the times of each: a small case on local processes, or those of a rank."""

from __future__ import annotations

from ...model.runner import StepRunner
from ...model.weights import probe_values
from ...parallel.ir.span import Span
from ...parallel.runtime.mesh import Mesh
from ...parallel.runtime.trace import traced_step
from ..cluster.processes import forked
from .parity import LR, OPTIMIZER, Case, load_batch
from .traced_gpu import traced_on_gpu

WARM_UP_STEPS = 2


def traced(case: Case) -> list[list[Span]]:
    """The spans of ``case.steps`` steps, by rank, after two that are not looked at. Runs local processes."""
    ranks = case.plan.world_size
    return [_spans(case)] if ranks == 1 else forked(ranks, lambda: _spans(case))


def _spans(case: Case) -> list[Span]:
    mesh = Mesh(case.plan) if case.plan.world_size > 1 else None
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed)
    runner.initialise(probe_values(case.seed))
    load_batch(case, runner, 0)
    return traced_steps(runner, case.steps)


def traced_steps(runner: StepRunner, steps: int) -> list[Span]:
    """Of one rank, on what is loaded, after two steps that are not looked at. Collective over its mesh."""
    for _ in range(WARM_UP_STEPS):
        runner.step(LR)
    trace = traced_step if runner.executor.device == "cpu" else traced_on_gpu
    return [span for _ in range(steps) for span in trace(runner.executor)]
