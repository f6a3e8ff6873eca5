"""No order in which collectives may start can deadlock, and without the order edges one can.

A collective's kernel holds the GPU until every rank of its group has started it. Here every rank has room for one such
kernel, and a scheduler that starts what it likes among what the rules allow:

    (a) compute before the issue point is done, hence every wait before it has returned
    (b) the previous collective of the communicator has ended
    (c) every collective that was issued earlier has started       these are the order edges

The real runs delay random ranks before random collectives: no rank may depend on another's pace.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from frozen_gathers import expected_gathers
from harness import Pool

from cinemesh.launch.proof.parity import LR, OPTIMIZER, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import weights
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.collectives import FUSED
from cinemesh.parallel.ir.communicators import communicator, communicator_name
from cinemesh.parallel.ir.frozen_layers import GATHERS, FrozenLayers
from cinemesh.parallel.ir.layout import FSDP, Axes
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.comm import BoundCollective, Communicator
from cinemesh.parallel.runtime.mesh import Mesh, group_ranks

FAMILIES = {
    "tp": "tp=2,tp_slices=3,recompute=full,defer_weight_gradients=true",
    "cp": "cp=2,kv_slices=3,grad_units=2,defer_weight_gradients=true",
    "cp chunks": "cp=2,dp_shard=2,kv_chunks=3,kv_first=true,grad_units=2,defer_weight_gradients=true",
    "fsdp": "dp_shard=3,prefetch=2,grad_units=2,micro_batches=2",
    "as built": "tp=2,cp=2,dp_shard=2",
    "fused": "tp=2,cp=2,dp_shard=2,fused_tp=true,kv_slices=3,defer_weight_gradients=true,grad_units=2",
    "all": "tp=2,cp=2,dp_shard=2,kv_slices=3,tp_slices=3,defer_weight_gradients=true,grad_units=2",
}


@dataclass(frozen=True)
class Collective:
    """``before``: the one before it on its communicator, or -1. ``waited``: which waits return before its issue."""

    before: int
    waited: int


@dataclass(frozen=True)
class Schedule:
    """What every rank runs, and which ranks take part in each collective with it."""

    collectives: list[Collective]
    groups: list[list[tuple[int, ...]]]  # [collective][rank] -> members
    ranks: int


def schedule_of(program: Program) -> Schedule:
    """The same for every rank."""
    plan = program.plan
    members = {
        op.axes: [tuple(group_ranks(plan, op.axes, rank)) for rank in range(plan.world_size)]
        for op in program.ops
        if op.comm is not None
    }
    last: dict[str, int] = {}
    number: dict[str, int] = {}
    collectives: list[Collective] = []
    groups: list[list[tuple[int, ...]]] = []
    waited: set[int] = set()
    for op in program.ops:
        if op.is_wait:
            waited.add(number[op.waits_for])
        elif op.comm is not None:
            number[op.name] = len(collectives)
            line = communicator(op)
            collectives.append(Collective(last.get(line, -1), sum(1 << k for k in waited)))
            last[line] = number[op.name]
            if op.kind in FUSED:  # it holds compute until it ends
                waited.add(number[op.name])
            groups.append(members[op.axes])
    return Schedule(collectives, groups, plan.world_size)


def deadlocks(schedule: Schedule, pick: Callable[[int], int], *, ordered: bool) -> bool:
    """Whether one random schedule gets stuck. ``pick(n)`` draws below n. Sets of collectives are bits of a number."""
    total, ranks = len(schedule.collectives), schedule.ranks
    resident = [-1] * ranks
    first = [0] * ranks  # all before it have started
    started = [0] * ranks
    ended = [0] * ranks
    left = total * ranks
    runnable = list(range(ranks))
    while left:
        if not runnable:
            return True
        at = pick(len(runnable))
        rank = runnable[at]
        able = []
        for k in range(first[rank], total):
            collective = schedule.collectives[k]
            if started[rank] >> k & 1:
                continue
            if collective.waited & ~ended[rank]:
                break  # nothing behind this point is issued yet
            if collective.before < 0 or ended[rank] >> collective.before & 1:
                able.append(k)
            if ordered:
                break
        if not able:
            runnable.pop(at)  # until something ends here
            continue
        k = able[pick(len(able))]
        resident[rank] = k
        started[rank] |= 1 << k
        while started[rank] >> first[rank] & 1:
            first[rank] += 1
        runnable.pop(at)
        group = schedule.groups[k][rank]
        if all(resident[member] == k for member in group):
            for member in group:
                resident[member] = -1
                ended[member] |= 1 << k
                runnable.append(member)
            left -= len(group)
    return False


@lru_cache
def family(name: str) -> Schedule:
    case = small_case(Plan.parse(FAMILIES[name], dtype="float32"))
    return schedule_of(prepare(build_step(case.config, case.plan, case.batch), backend="nccl"))


def count_deadlocks(name: str, schedules: int, *, ordered: bool) -> int:
    draw = random.Random(name).random
    schedule = family(name)
    return sum(deadlocks(schedule, lambda n: int(draw() * n), ordered=ordered) for _ in range(schedules))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_edges_keep_every_schedule_going(name: str) -> None:
    assert len(family(name).collectives) >= 20
    assert count_deadlocks(name, 100, ordered=True) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_edges_keep_10_000_schedules_going(name: str) -> None:
    assert count_deadlocks(name, 10_000, ordered=True) == 0


@pytest.mark.parametrize("name", ["cp", "fsdp", "all"])
def test_without_the_order_edges_some_schedule_deadlocks(name: str) -> None:
    """Else the simulator would be content with anything."""
    assert count_deadlocks(name, 100, ordered=False) > 0


ENCODER = FrozenLayers((2048, *[512] * 9), 16, 4)


def with_encoder(name: str, *, before: bool) -> Schedule:
    """A step of a family behind a turn of frozen layers: between two steps, or, planted, beside this one.

    As ``GatheredLayers.turn``: a gather is issued behind the wait for the one before. Between steps the last one has
    ended, and every unit has computed, when the first collective of the step is issued.
    """
    step, plan = family(name), small_case(Plan.parse(FAMILIES[name], dtype="float32")).plan
    gathers = expected_gathers(ENCODER, plan)
    assert {entry.communicator for entry in gathers} == {communicator_name(FSDP, GATHERS)}
    count = len(gathers)
    turn = [Collective(k - 1, (1 << k) - 1) for k in range(count)]
    done = (1 << count) - 1 if before else 0
    moved = [
        Collective(one.before + count if one.before >= 0 else -1, one.waited << count | done)
        for one in step.collectives
    ]  # fmt: skip
    members = [tuple(group_ranks(plan, FSDP, rank)) for rank in range(plan.world_size)]
    return Schedule([*turn, *moved], [members] * count + step.groups, step.ranks)


@pytest.mark.parametrize("name", ["cp", "fsdp", "all"])
def test_an_encoder_between_steps_keeps_every_schedule_going(name: str) -> None:
    """Whatever order the scheduler would like: in order, as all that one thread issues."""
    draw = random.Random(name).random
    schedule = with_encoder(name, before=True)
    assert len(schedule.collectives) >= 30
    assert not any(deadlocks(schedule, lambda n: int(draw() * n), ordered=True) for _ in range(100))


@pytest.mark.parametrize("name", ["cp", "all"])
def test_an_encoder_beside_a_step_without_order_deadlocks(name: str) -> None:
    """Planted: on a communicator of its own, in no order to the step's; else the rule would say nothing."""
    draw = random.Random(name).random
    schedule = with_encoder(name, before=False)
    turn = ENCODER.units
    free = [replace(one, waited=0) if k < len(turn) else one for k, one in enumerate(schedule.collectives)]
    loose = replace(schedule, collectives=free)
    assert any(deadlocks(loose, lambda n: int(draw() * n), ordered=False) for _ in range(100))


def test_ranks_that_issue_in_different_orders_deadlock() -> None:
    """Two communicators over the same two ranks, which disagree: the order edges cannot help."""
    both = [(0, 1), (0, 1)]
    one = Schedule([Collective(-1, 0), Collective(-1, 0)], [both, both], 2)
    assert not deadlocks(one, random.Random(0).randrange, ordered=True)
    found = [deadlocks(one, random.Random(seed).randrange, ordered=False) for seed in range(50)]
    assert any(found) and not all(found)


# -- real runs --------------------------------------------------------------------------------------------------------


class Dawdling(Communicator):
    """Sleeps before some collectives; which, and how long, differs from rank to rank and from run to run."""

    def __init__(self, mesh: Mesh, seed: int) -> None:
        super().__init__(mesh)
        self.random = random.Random(1000 * seed + mesh.rank)

    def bind(self, kind: str, axes: Axes, source: torch.Tensor, output: torch.Tensor, staging: Any) -> BoundCollective:
        collective = super().bind(kind, axes, source, output, staging)

        def issue() -> Any:
            if self.random.random() < 0.1:
                time.sleep(self.random.random() * 2e-3)
            return collective.issue()

        return BoundCollective(issue, collective.wait)


def job(text: str, runs: int) -> list[torch.Tensor]:
    """The master weights of this rank after one step, for every run."""
    case = small_case(Plan.parse(text, dtype="float32"), max_procs=8, steps=1)
    mesh = Mesh(case.plan)
    comm = Dawdling(mesh, 0)
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed, comm=comm)
    results = []
    for run in range(runs):
        comm.random = random.Random(1000 * run + mesh.rank)
        runner.initialise(weights.probe_values(case.seed))
        load_batch(case, runner, 0)
        runner.step(LR)
        results.append(runner.buffers["master"].clone())
    mesh.close()
    return results


def check_runs(pool: Pool, text: str, runs: int) -> None:
    plan = Plan.parse(text)
    for rank, results in enumerate(pool.run(plan.world_size, job, text, runs)):
        assert len(results) == runs
        assert all(torch.equal(result, results[0]) for result in results[1:]), rank


def test_delayed_runs_agree_bitwise(pool: Pool) -> None:
    check_runs(pool, "tp=2,cp=2,kv_slices=3,tp_slices=3,defer_weight_gradients=true,grad_units=2", 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cp", "as built", "all", "fsdp"])
def test_200_delayed_runs_agree_bitwise(pool: Pool, name: str) -> None:
    check_runs(pool, FAMILIES[name], 50)
