"""Replay is the executor's step bit by bit, and does nothing that it need not; what no replay can do is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Pool
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from cinemesh.kernels import reference
from cinemesh.kernels.reference import Kernel
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.parity import OPTIMIZER, Case, RankRun, load_batch, run_rank
from cinemesh.launch.proof.verify import Report, compare, small_case
from cinemesh.model import weights
from cinemesh.model.runner import StepRunner
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.liveness import lifetimes, persistent
from cinemesh.parallel.runtime.comm import gather_objects
from cinemesh.parallel.runtime.frozen import Frozen
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.parallel.runtime.tape import CallRecorder, Prepared, compile_calls, ready, storage_key, tensors_in

aten = torch.ops.aten
STEPS = 6


def runner_of(case: Case, mesh: Mesh | None, **doors: Any) -> StepRunner:
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed, **doors)
    runner.initialise(weights.probe_values(case.seed))
    return runner


def differing(text: str) -> list[str]:
    """What differs bitwise between replay and the executor, over STEPS steps; batch, lr and noise change each step."""
    case = small_case(Plan.parse(text))
    mesh = Mesh(case.plan) if case.plan.world_size > 1 else None
    plain, replayed = runner_of(case, mesh), runner_of(case, mesh)
    assert replayed.capture("required") is None and isinstance(replayed.replay, Frozen)
    found: list[str] = []
    for step in range(STEPS):
        for runner in (plain, replayed):
            load_batch(case, runner, step)
            runner.step(1e-2 / (step + 1))
        found += [
            f"step {step}: {name}"
            for name in persistent(plain.program)
            if not torch.equal(plain.executor.buffers[name], replayed.executor.buffers[name])
        ]
    if mesh is not None:
        mesh.close()
    return found


@pytest.mark.parametrize("text", ["dtype=float32", "dtype=bf16,micro_batches=2", "dtype=float64,recompute=full"])
def test_replay_is_bitwise_the_executor(text: str) -> None:
    assert differing(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "tp=2,cp=2,dtype=float32",
        "dp_shard=2,dp_replicate=2,dtype=bf16,micro_batches=2",
        "tp=2,cp=2,fused_tp=true,recompute=full,dtype=float32",
    ],
)
def test_so_it_is_on_processes(pool: Pool, text: str) -> None:
    assert pool.run(4, differing, text) == [[]] * 4


def report_of_replay(case: Case) -> Report | None:
    mesh = Mesh(case.plan)
    runner = runner_of(case, mesh)
    runner.capture("required")
    runs = gather_objects(run_rank(case, mesh, runner))
    mesh.close()
    if mesh.rank:
        return None
    return compare(case, [run for run in runs if isinstance(run, RankRun)], runner.program)


@pytest.mark.parametrize("text", ["tp=2,dp_shard=2,micro_batches=2,recompute=full", "cp=2,recompute=none,prefetch=2"])
def test_replay_keeps_parity_ledger_and_bytes(pool: Pool, text: str) -> None:
    """The same witnesses as of the executor: c10d ops and storages from outside, and the autograd model."""
    case = small_case(Plan.parse(text, dtype="float64"))
    report = pool.run(case.plan.world_size, report_of_replay, case)[0]
    assert report.ledger_equal, report.ledger_difference
    assert report.live_bytes_equal and report.replicas_equal
    assert all(report.worst[what] <= report.bounds[what] for what in report.worst), report


def test_capture_changes_no_state() -> None:
    case = small_case(Plan(dtype="float32"))
    runner = runner_of(case, None)
    load_batch(case, runner, 0)
    runner.step(1e-2)
    before = {name: runner.buffers[name].clone() for name in ("master", "exp_avg", "exp_avg_sq", "ema", "counters")}
    runner.capture()
    assert all(torch.equal(runner.buffers[name], value) for name, value in before.items())


class Allocations(TorchDispatchMode):
    """The ops that made new storages."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_key(t) for t in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.made += [func._schema.name for leaf in tensors_in(result) if storage_key(leaf) not in given]
        return result


def test_replay_allocates_only_where_a_kernel_has_no_out_variant() -> None:
    case = small_case(Plan(dtype="float32"))
    runner = runner_of(case, None)
    runner.capture("required")
    load_batch(case, runner, 0)
    with Allocations() as allocations:
        runner.step(1e-2)
    assert {name for name in allocations.made if "attention" not in name} == set()


def test_the_workspace_is_no_larger_than_declared() -> None:
    case = small_case(Plan(dtype="float32", recompute="full"))
    runner = runner_of(case, None)
    runner.capture("required")
    assert isinstance(runner.replay, Frozen)
    for op, segment, declared in zip(
        runner.program.ops, runner.replay.segments, lifetimes(runner.program).workspace_bytes, strict=True
    ):
        if segment is not None:
            pieces = 256 * len(segment.calls)  # every temporary starts at an aligned place
            assert segment.workspace_bytes <= declared + pieces, op


# -- the tape ---------------------------------------------------------------------------------------------------------


def replayed(
    kernel: Callable[[Tensor, Tensor], object], x: Tensor, out: Tensor
) -> tuple[list[Any], Callable[[], None]]:
    """The prepared calls of a kernel that was recorded once, and a function that makes them."""
    with CallRecorder() as recorder:
        kernel(x, out)
    segment = compile_calls(recorder.calls, {storage_key(x), storage_key(out)})
    workspace = torch.empty(segment.workspace_bytes, dtype=torch.uint8).fill_(0xFF)
    calls = [ready(call, workspace) for call in segment.calls]

    def run() -> None:
        for call in calls:
            call()

    return segment.calls, run


SCRATCH = torch.ones(4, 6)
KERNELS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "temporaries": lambda x, out: out.copy_((x * 2 + 1).sin().sum(0, keepdim=True) * x),
    "views of temporaries": lambda x, out: out.copy_((x + 1).t().contiguous().t()[:, :].view(4, 6) * 3),
    "a constant that is filled in parts": lambda x, out: out.copy_(x + _ramp()),
    "an accumulator that starts constant": lambda x, out: out.copy_(_accumulated(x)),
    "a constant changed after it was used": lambda x, out: _used_then_changed(x, out),
    "a scratch that outlives the step": lambda x, out: out.copy_(SCRATCH.zero_().add_(x) * 2),
    "a scalar of the data": lambda x, out: out.copy_(x / x.sum().clamp(min=1)),
    "an op without out": lambda x, out: out.copy_(scaled_dot_product_attention(x[None], x[None], x[None])[0]),
}


def _ramp() -> Tensor:
    table = torch.zeros(4, 6)
    table[1:].fill_(2.0)
    table[:, 0].copy_(torch.arange(4.0))
    return table


def _accumulated(x: Tensor) -> Tensor:
    total = torch.zeros(4, 6)
    for row in range(4):
        total[row].add_(x[row]).mul_(row + 1)
    return total


def _used_then_changed(x: Tensor, out: Tensor) -> None:
    shift = torch.ones(6)
    out.copy_(x + shift)
    shift.mul_(5)
    out.add_(shift)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_kernel_replays_on_other_values(kernel: Callable[[Tensor, Tensor], object]) -> None:
    """Recorded on one x, replayed on another: whatever was taken for constant and is not shows here."""
    x, out = torch.rand(4, 6), torch.empty(4, 6)
    _, run = replayed(kernel, x, out)
    for _ in range(2):
        x.copy_(torch.rand(4, 6))
        wanted = torch.empty(4, 6)
        kernel(x.clone(), wanted)
        out.fill_(torch.nan)
        run()
        assert torch.equal(out, wanted)


def test_what_depends_on_nothing_is_computed_once() -> None:
    calls, _ = replayed(lambda x, out: out.copy_(x + torch.arange(6.0).exp() * 2), torch.rand(4, 6), torch.empty(4, 6))
    assert [call.op._schema.name for call in calls] == ["aten::add", "aten::copy_"]


def test_what_stays_and_what_is_made_each_step_is_counted() -> None:
    """A constant of 6 fp32, read twice; a temporary of 24. What is given from outside is neither."""
    x, out = torch.rand(4, 6), torch.empty(4, 6)
    with CallRecorder() as recorder:
        constant = torch.arange(6.0) * 2
        out.copy_((x + constant) * constant)
    segment = compile_calls(recorder.calls, {storage_key(x), storage_key(out)})
    assert segment.constant_bytes == 4 * 6
    assert segment.workspace_bytes == 512, "two temporaries of 96 bytes, each on a boundary of 256"


def test_a_call_goes_through_torchs_binding_where_that_means_the_same() -> None:
    """The binding costs half; of a number it makes a tensor, which is another overload, so that one is not believed."""
    x, y, out, workspace = torch.rand(3), torch.rand(3), torch.empty(3), torch.empty(0, dtype=torch.uint8)
    calls: list[tuple[Prepared, object, Tensor]] = [
        (Prepared(aten.add.out, (x, y), {"alpha": 2, "out": out}), torch.add, x + 2 * y),
        (Prepared(aten.mul.out, (x, y), {"out": out}), torch.mul, x * y),
        (Prepared(aten.copy_.default, (out, x), {}), Tensor.copy_, x),
        (Prepared(aten.add_.Scalar, (out, 1.0), {}), aten.add_.Scalar._op, x + 1),
    ]
    for prepared, function, wanted in calls:
        call: Any = ready(prepared, workspace)
        call()
        assert call.func == function and torch.equal(out, wanted)


# -- what no replay can do --------------------------------------------------------------------------------------------

HAZARDS: dict[str, tuple[Kernel, str]] = {
    "host read": (lambda i, o: o[0].copy_(i[0]) if i[0].sum().item() < 1e9 else None, "reads a value back to the host"),
    "branch": (lambda i, o: o[0].copy_(i[0]) if (i[0] == i[0]).all() else None, "reads a value back to the host"),
    "shape": (lambda i, o: o[0].copy_(i[0]).add_(i[0].nonzero().numel() * 0), "shape that depends on data"),
    "mask": (lambda i, o: o[0].copy_(i[0]).add_(i[0][i[0] > 0].sum() * 0), "shape that depends on data"),
    "generator": (lambda i, o: o[0].copy_(i[0] + 0 * torch.rand_like(i[0])), "draws from a generator's state"),
    "host tensor": (lambda i, o: o[0].copy_(i[0] * torch.tensor(1.0)), "makes a tensor from host values"),
}


def with_silu(kernel: Kernel) -> dict[str, Kernel]:
    def silu(inputs: reference.Tensors, outputs: reference.Tensors) -> None:
        reference.silu(inputs, outputs)
        kernel(outputs, [outputs[0].clone()])

    return kernels_for("cpu") | {"silu": silu}


@pytest.mark.parametrize(("kernel", "complaint"), HAZARDS.values(), ids=HAZARDS)
def test_a_step_that_cannot_be_replayed_says_why(kernel: Kernel, complaint: str) -> None:
    case = small_case(Plan(dtype="float32"))
    runner = runner_of(case, None, kernels=with_silu(kernel))
    failure = runner.capture("auto")
    assert failure is not None and complaint in failure and "(silu)" in failure and failure.startswith("rank 0: mb0/")
    assert runner.replay is None


def fails_on_rank_1(case: Case) -> tuple[str | None, bool, bool]:
    mesh = Mesh(case.plan)
    broken = with_silu(HAZARDS["host read"][0]) if mesh.rank == 1 else None
    runner = runner_of(case, mesh, kernels=broken)
    failure = runner.capture("auto")
    load_batch(case, runner, 0)
    runner.step(1e-2)
    answer = failure, runner.replay is None, bool(runner.loss.isfinite())
    mesh.close()
    return answer


def test_one_rank_that_cannot_replay_keeps_all_from_it(pool: Pool) -> None:
    """A rank that fell back alone would leave the others waiting in a graph."""
    for failure, fell_back, finite in pool.run(2, fails_on_rank_1, small_case(Plan.parse("tp=2", dtype="float32"))):
        assert failure is not None and failure.startswith("rank 1: ") and "(silu)" in failure
        assert fell_back and finite
