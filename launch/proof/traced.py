"""Steps run with the times of every record, in turns with steps that nobody watches: what a rank's profile is made of.

A step on a CPU is the one that a run replays, its records' frozen calls with a moment noted behind each. On a GPU it is
launched record by record, with events around each; a captured one is replayed under CUPTI.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...model.runner import StepRunner
from ...model.weights import probe_values
from ...parallel.ir.span import Span
from ...parallel.runtime.executor import BoundRecord, Executor
from ...parallel.runtime.frozen import Frozen
from ...parallel.runtime.graph import Graph
from ...parallel.runtime.mesh import Mesh
from ...parallel.runtime.tape import ready
from ...parallel.runtime.trace import traced_step
from ..cluster.processes import forked
from .parity import LR, OPTIMIZER, Case, load_batch
from .traced_gpu import traced_on_gpu
from .traced_graph import kernels_of_records, traced_replay

WARM_UP_STEPS = 2

NextStep = Callable[[], float]  # loads the samples of a step; its learning rate


@dataclass(frozen=True)
class TakenSteps:
    """Of one rank: seconds of the steps that nobody watched, and of loading their samples; spans of the others."""

    plain_s: list[float]
    loading_s: list[float]
    watched: list[list[Span]]

    @property
    def spans(self) -> list[Span]:
        return [span for step in self.watched for span in step]


def traced(case: Case) -> list[TakenSteps]:
    """``case.steps`` steps, by rank, after two that are not looked at. Runs local processes."""
    ranks = case.plan.world_size
    return [_taken(case)] if ranks == 1 else forked(ranks, lambda: _taken(case))


def _taken(case: Case) -> TakenSteps:
    mesh = Mesh(case.plan) if case.plan.world_size > 1 else None
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed)
    runner.initialise(probe_values(case.seed))
    runner.capture()
    load_batch(case, runner, 0)
    return taken_steps(runner, case.steps)


def taken_steps(runner: StepRunner, steps: int, begin: NextStep = lambda: LR) -> TakenSteps:
    """``steps`` of one rank watched, and as many not, behind two that warm up. Collective over its mesh.

    ``begin`` is called before each of them; unless told, the samples stay those that are loaded.
    """
    for _ in range(WARM_UP_STEPS):
        runner.step(begin())
    watch = _watch(runner)
    taken = TakenSteps([], [], [])
    for _ in range(steps):
        begun = time.perf_counter()
        lr = begin()
        _wait(runner)
        loaded = time.perf_counter()
        runner.step(lr)
        _wait(runner)
        taken.plain_s.append(time.perf_counter() - loaded)
        taken.loading_s.append(loaded - begun)
        runner.buffers["lr"].fill_(begin())
        taken.watched.append(watch())
    return taken


def _watch(runner: StepRunner) -> Callable[[], list[Span]]:
    """What runs one step and answers when all of it ran."""
    if runner.executor.device == "cpu":
        return partial(traced_step, records_of(runner.executor, runner.replay))
    if isinstance(runner.replay, Graph):
        return partial(traced_replay, runner.program.ops, kernels_of_records(runner.executor), runner.replay.run)
    return partial(traced_on_gpu, runner.executor)


def records_of(executor: Executor, replay: object) -> Sequence[BoundRecord]:
    """The records of a step on a CPU, fused ones taken apart; each runs the calls that a replay runs of it."""
    if not isinstance(replay, Frozen):
        return [part for record in executor.records for part in record.parts or (record,)]
    calls = [None if s is None else [ready(call, replay.workspace) for call in s.calls] for s in replay.segments]
    return [
        part if own is None else replace(part, run=partial(_run, own))
        for part, own in zip(replay.parts, calls, strict=True)
    ]


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _wait(runner: StepRunner) -> None:
    if runner.executor.device != "cpu":
        torch.cuda.synchronize()
