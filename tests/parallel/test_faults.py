"""The check that the plans are right is itself right: every planted fault must turn it red.

Faults are planted after the build, through the doors of ``StepRunner`` (program, kernels, communicator), since the
build would refuse several of them. A check that compares a thing with itself, or not at all, is found only here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import Tensor

from cinemesh.kernels import reference
from cinemesh.kernels.reference import Kernel
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.parity import LR, OPTIMIZER, Case, load_batch
from cinemesh.launch.proof.verify import Report, small_case, verify_on_rank
from cinemesh.model import weights
from cinemesh.model.inputs import LATENTS
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.layout import FSDP, WORLD, Axes
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Collective, Op, Wait
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.comm import BoundCollective, Communicator
from cinemesh.parallel.runtime.mesh import Mesh


def program_of(case: Case) -> Program:
    return prepare(build_step(case.config, case.plan, case.batch, OPTIMIZER, seed=case.seed), backend="gloo")


def runner(case: Case, mesh: Mesh, **doors: Any) -> StepRunner:
    return StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed, **doors)


def altered(case: Case, mesh: Mesh, change: Callable[[Op], Op]) -> StepRunner:
    program = program_of(case)
    return runner(case, mesh, program=program.with_ops([change(op) for op in program.ops]))


def with_kernels(case: Case, mesh: Mesh, **kernels: Kernel) -> StepRunner:
    return runner(case, mesh, kernels=kernels_for("cpu") | kernels)


# -- orders of the cp gather ------------------------------------------------------------------------------------------


class Reordered(Communicator):
    """Gathers K or V over cp in the reverse rank order; ``scatter``: reverses dK and dV before their reduction."""

    def __init__(self, mesh: Mesh, *, k: bool = False, v: bool = False, scatter: bool = False) -> None:
        super().__init__(mesh)
        self.halves = [half for half, wanted in enumerate((k, v)) if wanted]
        self.scatter = scatter

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        issue, wait = super().bind(kind, axes, source, output, staging)

        def issue_reversed() -> dist.Work | None:
            reverse_ranks(source, self.mesh.plan.cp, [0, 1])
            return issue()

        def wait_and_reverse() -> None:
            wait()
            reverse_ranks(output, self.mesh.plan.cp, self.halves)

        if axes != ("cp",):
            return BoundCollective(issue, wait)
        if kind == "reduce_scatter":
            return BoundCollective(issue_reversed if self.scatter else issue, wait)
        return BoundCollective(issue, wait_and_reverse)


def reverse_ranks(kv: Tensor, ranks: int, halves: list[int]) -> None:
    """[S, B, 2, H, K]: the blocks of tokens that the ranks gave, last first, of K (0), V (1) or both."""
    for half in halves:
        blocks = kv[:, :, half].unflatten(0, (ranks, -1))
        blocks.copy_(blocks.flip(0))


def one_gathered_in_another_order(case: Case, mesh: Mesh) -> StepRunner:
    return runner(case, mesh, comm=Reordered(mesh, v=True))


def both_gathered_in_another_order(case: Case, mesh: Mesh) -> StepRunner:
    return runner(case, mesh, comm=Reordered(mesh, k=True, v=True, scatter=True))


def scattered_in_another_order(case: Case, mesh: Mesh) -> StepRunner:
    return runner(case, mesh, comm=Reordered(mesh, scatter=True))


# -- sums -------------------------------------------------------------------------------------------------------------


def norm_gradient_without_the_tp_sum(case: Case, mesh: Mesh) -> StepRunner:
    def backward(inputs: reference.Tensors, outputs: reference.Tensors, **attrs: Any) -> None:
        reference.modulate_norm_backward(inputs, outputs, **attrs)
        outputs[1].mul_(mesh.coordinates["tp"] == 0)  # only the first rank's part is left

    return with_kernels(case, mesh, modulate_norm_backward=backward)


def cp_counted_twice_in_the_loss(case: Case, mesh: Mesh) -> StepRunner:
    def change(op: Op) -> Op:
        if not op.kind.startswith("velocity_loss"):
            return op
        return replace(op, attrs={**op.attrs, "elements": op.attrs["elements"] // case.plan.cp})

    return altered(case, mesh, change)


def replicas_counted_in_the_global_norm(case: Case, mesh: Mesh) -> StepRunner:
    def change(op: Op) -> Op:
        if op.role != "sum_of_squares_total":
            return op
        assert isinstance(op.comm, Collective | Wait)
        return replace(op, comm=replace(op.comm, axes=WORLD))

    return altered(case, mesh, change)


# -- attention and noise ----------------------------------------------------------------------------------------------


def causal(case: Case, mesh: Mesh) -> StepRunner:
    def attention(inputs: reference.Tensors, outputs: reference.Tensors) -> None:
        q, kv = inputs
        first = mesh.coordinates["cp"] * q.shape[0]
        scores = torch.einsum("tbhk,sbhk->bhts", q, kv[:, :, 0]) / q.shape[-1] ** 0.5
        future = torch.arange(kv.shape[0])[None] > torch.arange(first, first + q.shape[0])[:, None]
        scores.masked_fill_(future, -torch.inf)
        outputs[1].copy_(scores.logsumexp(-1))
        outputs[0].copy_(torch.einsum("bhts,sbhk->tbhk", scores.softmax(-1), kv[:, :, 1]))

    return with_kernels(case, mesh, attention=attention)


def noise_drawn_per_rank(case: Case, mesh: Mesh) -> StepRunner:
    def draw(inputs: reference.Tensors, outputs: reference.Tensors, *, seed: int, **attrs: Any) -> None:
        reference.draw_noise(inputs, outputs, seed=seed + mesh.rank, **attrs)

    return with_kernels(case, mesh, draw_noise=draw)


def in_places(case: Case, mesh: Mesh, places: Callable[[Tensor], Tensor]) -> StepRunner:
    """Draws in other places than the step's."""

    def moved(kernel: Kernel) -> Kernel:
        def draw(inputs: reference.Tensors, outputs: reference.Tensors, **attrs: Any) -> None:
            ids, given, counters = inputs
            kernel((ids, places(given), counters), outputs, **attrs)

        return draw

    return with_kernels(case, mesh, **{op: moved(reference.REFERENCE[op]) for op in ("draw_time", "draw_noise")})


def place_ignored(case: Case, mesh: Mesh) -> StepRunner:
    return in_places(case, mesh, torch.zeros_like)


def place_in_the_ranks_own_share(case: Case, mesh: Mesh) -> StepRunner:
    return in_places(case, mesh, lambda given: torch.arange(len(given)))


# -- the ledger -------------------------------------------------------------------------------------------------------


class Dropping(Communicator):
    """Leaves out the first gather over cp, as if its rank had forgotten it."""

    bound: BoundCollective | None = None

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        collective = super().bind(kind, axes, source, output, staging)
        if self.bound is not None or axes != ("cp",) or kind != "all_gather":
            return collective
        self.bound = collective

        def issue() -> dist.Work | None:
            if not self.record:
                return collective.issue()
            output.copy_(torch.cat([source.view(-1)] * self.mesh.plan.cp).view(output.shape))

        def wait() -> None:
            if not self.record:
                collective.wait()

        return BoundCollective(issue, wait)


class Adding(Communicator):
    """One all-reduce too many, of ones that nobody reads: no number changes. Not written to ``comm``'s own ledger."""

    added = False

    def bind(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> BoundCollective:
        collective = super().bind(kind, axes, source, output, staging)

        def wait() -> None:
            collective.wait()
            if self.record and not self.added:
                self.added = True
                dist.all_reduce(torch.ones(1), group=self.mesh.group(("cp",), "all_reduce"))

        return BoundCollective(collective.issue, wait)


def dropped_collective(case: Case, mesh: Mesh) -> StepRunner:
    return runner(case, mesh, comm=Dropping(mesh))


def extra_collective(case: Case, mesh: Mesh) -> StepRunner:
    return runner(case, mesh, comm=Adding(mesh))


def wrong_order(case: Case, mesh: Mesh) -> StepRunner:
    """Gathers of two units of different size change places: the same numbers come out."""
    program = program_of(case)
    ops = list(program.ops)
    gathers = [i for i, op in enumerate(ops) if op.kind == "all_gather" and op.lane == "dp_shard*cp"]
    ops.insert(gathers[0], ops.pop(gathers[1]))
    return runner(case, mesh, program=program.with_ops(ops))


class OneForBoth(Mesh):
    """Gathers and reductions of units share a communicator: neither axes, bytes nor order show it."""

    def group(self, axes: Axes, kind: str) -> dist.ProcessGroup:
        return super().group(axes, "all_gather" if axes == FSDP else kind)


class Swapped(Mesh):
    """Each of the two runs on the other's communicator."""

    def group(self, axes: Axes, kind: str) -> dist.ProcessGroup:
        other = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}
        return super().group(axes, other.get(kind, kind) if axes == FSDP else kind)


def one_communicator_for_both(case: Case, mesh: Mesh) -> StepRunner:
    mesh.__class__ = OneForBoth
    return runner(case, mesh)


def swapped_communicators(case: Case, mesh: Mesh) -> StepRunner:
    mesh.__class__ = Swapped
    return runner(case, mesh)


# -- the tests --------------------------------------------------------------------------------------------------------

Plant = Callable[[Case, Mesh], StepRunner]


def job(case: Case, plant: Plant, whole_plan_ledger: bool) -> Report | None:
    planned = program_of(case) if whole_plan_ledger else None
    return verify_on_rank(case, partial(plant, case), planned)


def report_of(pool: Pool, plan: str, plant: Plant, *, ledger: bool = False) -> Report:
    case = small_case(Plan.parse(plan, dtype="float64"), steps=2)
    report = pool.run(case.plan.world_size, job, case, plant, ledger)[0]
    assert isinstance(report, Report)
    return report


@pytest.mark.parametrize(
    ("plan", "plant", "seen"),
    [
        ("cp=3", one_gathered_in_another_order, "loss"),
        ("cp=3", scattered_in_another_order, "gradient"),
        ("tp=2", norm_gradient_without_the_tp_sum, "gradient"),
        ("cp=2", cp_counted_twice_in_the_loss, "loss"),
        ("cp=2", cp_counted_twice_in_the_loss, "gradient"),
        ("dp_replicate=2,dp_shard=2", replicas_counted_in_the_global_norm, "gradient"),
        ("cp=2", causal, "loss"),
        ("tp=2", noise_drawn_per_rank, "loss"),
        ("tp=2", place_ignored, "loss"),
        ("dp_shard=2", place_in_the_ranks_own_share, "loss"),
        ("tp=2,micro_batches=2", place_in_the_ranks_own_share, "loss"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_planted_fault_is_seen(pool: Pool, plan: str, plant: Plant, seen: str) -> None:
    report = report_of(pool, plan, plant)
    assert not report.ok
    assert report.ledger_equal, "the fault is one of numbers, not of communication"
    assert report.worst[seen] > 1e-3  # so that float32's bound, 2e-4, would see it too


def test_the_faulty_gradient_is_named(pool: Pool) -> None:
    where = report_of(pool, "tp=2", norm_gradient_without_the_tp_sum).where["gradient"]
    assert "norm" in where and "global" not in where


def test_one_order_for_both_is_no_fault(pool: Pool) -> None:
    """Attention does not see in which order keys come: a check that turned red would compare more than the result."""
    report = report_of(pool, "cp=3", both_gathered_in_another_order)
    assert report.ok, report


PLANTS: dict[Plant, str] = {
    dropped_collective: "cp",
    extra_collective: "cp",
    wrong_order: "dp_shard*cp",
    one_communicator_for_both: "dp_shard*cp",
    swapped_communicators: "dp_shard*cp",
}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda f: f.__name__)
def test_the_ledger_sees(pool: Pool, plant: Plant) -> None:
    report = report_of(pool, "cp=2,dp_shard=2", plant, ledger=True)
    assert not report.ok and not report.ledger_equal
    if plant is not dropped_collective:  # whose numbers are wrong as well
        assert all(report.worst[what] <= report.bounds[what] for what in report.worst)
    assert report.ledger_difference is not None
    assert report.ledger_difference.startswith(f"lane {PLANTS[plant]}")


# -- a step that is skipped -------------------------------------------------------------------------------------------


def inputs_of(rank: StepRunner, name: str) -> list[Tensor]:
    """One a micro-batch."""
    return [rank.executor.buffers[given.buffer] for given in rank.program.inputs if given.name == name]


def steps_with_nan(case: Case, at: int) -> list[dict[str, Tensor]]:
    """States after every step; one latent of data rank 0 is NaN in step ``at``."""
    mesh = Mesh(case.plan)
    rank = runner(case, mesh)
    rank.initialise(weights.probe_values(case.seed))
    states: list[dict[str, Tensor]] = []
    for step in range(3):
        load_batch(case, rank, step)
        if step == at and mesh.data_rank == 0:
            inputs_of(rank, LATENTS)[0].view(-1)[5] = torch.nan
        rank.step(LR)
        names = ("master", "exp_avg", "exp_avg_sq", "ema", "counters", "gradient_norm")
        states.append({name: rank.buffers[name].clone() for name in names})
    mesh.close()
    return states


@pytest.mark.parametrize("at", [0, 1])
def test_a_nan_batch_changes_nothing_but_the_step_counter(pool: Pool, at: int) -> None:
    """On every rank, also those whose own samples were good; the run goes on afterwards, from finite weights."""
    case = small_case(Plan.parse("tp=2,dp_shard=2", dtype="float32"))
    for states in pool.run(4, steps_with_nan, case, at):
        assert states[at]["gradient_norm"].isnan()
        assert states[at]["counters"].tolist() == [at + 1, at]
        assert states[2]["counters"].tolist() == [3, 2]
        for name in ("master", "exp_avg", "exp_avg_sq", "ema"):
            assert states[2][name].isfinite().all()
            assert not torch.equal(states[2][name], states[1][name])
            if at:
                assert torch.equal(states[at][name], states[at - 1][name]), name
        if not at:
            assert not states[0]["exp_avg"].any() and not states[0]["exp_avg_sq"].any()
            assert torch.equal(states[0]["master"], states[0]["ema"])
