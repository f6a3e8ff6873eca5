"""Capture where CUDA is pretended: the order of what is asked of it, and what a failure leaves. No GPU is needed."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from harness import Pool

from cinemesh.errors import CinemeshError
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.parity import OPTIMIZER, Case, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import runner as runner_module
from cinemesh.model import weights
from cinemesh.model.runner import StepRunner
from cinemesh.parallel.ir.nccl_stack import CAPTURED, NcclStack
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.graph import Graph, GraphPool, _abandoned
from cinemesh.parallel.runtime.mesh import Mesh


def case_of(text: str) -> Case:
    return small_case(Plan.parse(text))


class PretendGraph:
    """What stands for ``torch.cuda.CUDAGraph`` where there is no GPU."""

    made: ClassVar[list[PretendGraph]] = []

    def __init__(self, keep_graph: bool = False) -> None:
        self.kept, self.was_reset = keep_graph, False
        self.made.append(self)

    def reset(self) -> None:
        self.was_reset = True


class Capturing:
    """What stands for ``torch.cuda.graph``. ``ends_badly``: as CUDA does once something failed inside."""

    ends_badly = False

    def __init__(self, asked: list[str], mode: str) -> None:
        self.asked, self.mode = asked, mode

    def __enter__(self) -> None:
        self.asked.append(f"capture {self.mode}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.ends_badly:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of what is asked of CUDA. The logic around a capture is tested so; a capture itself is not."""
    return pretend(monkeypatch)


def pretend(patch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    pools = itertools.count(1)
    patch.setattr(runner_module, "nccl_stack", lambda: NcclStack(*CAPTURED))

    class Stream:
        def __init__(self, device: str = "") -> None: ...

        def wait_stream(self, other: object) -> None:
            asked.append("wait")

    def noted(name: str, answer: Any = None) -> Any:
        return lambda *args, **kwargs: (asked.append(name), answer)[1]

    def captured(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        return Capturing(asked, capture_error_mode)

    PretendGraph.made.clear()
    for name, value in {
        "Stream": Stream, "CUDAGraph": PretendGraph, "graph": captured, "graph_pool_handle": lambda: (0, next(pools)),
        "current_stream": Stream, "stream": lambda stream: nullcontext(), "set_stream": noted("set_stream"),
        "synchronize": noted("synchronize"), "empty_cache": noted("empty_cache"),
        "memory_reserved": noted("memory_reserved", 0), "current_device": lambda: 3,
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        told = name.removeprefix("_cuda_")
        patch.setattr(torch._C, name, lambda *given, told=told: asked.append(f"{told} {given}"), raising=False)
    return asked


def pretending(case: Case, **doors: Any) -> StepRunner:
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed, **doors)
    runner.initialise(weights.probe_values(case.seed))
    runner.executor.device = "cuda"
    return runner


def test_warm_up_drain_then_capture_then_teardown(pretend_cuda: list[str]) -> None:
    runner = pretending(case_of("dtype=float32"))
    before = {name: runner.buffers[name].clone() for name in ("master", "exp_avg", "ema", "counters")}
    assert runner.capture("required") is None and isinstance(runner.replay, Graph)
    assert pretend_cuda.index("synchronize") < pretend_cuda.index("empty_cache") < len(pretend_cuda) - 1
    assert pretend_cuda.index("wait") < pretend_cuda.index("synchronize") < pretend_cuda.index("capture thread_local")
    # The warm-up ran on NaN samples, and so did what stands for the capture here: no update may have come of it.
    assert all(torch.equal(runner.buffers[name], value) for name, value in before.items() if name != "counters")
    runner.close()
    assert [graph.was_reset for graph in PretendGraph.made] == [True] and runner.replay is None


def test_an_op_that_refuses_is_named_and_the_step_still_runs(pretend_cuda: list[str]) -> None:
    calls: list[int] = []
    silu = kernels_for("cpu")["silu"]

    def refuses(inputs: Any, outputs: Any) -> None:
        calls.append(1)
        if any(text.startswith("capture") for text in pretend_cuda) and "set_stream" not in pretend_cuda:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        silu(inputs, outputs)

    case = case_of("dtype=float32")
    runner = pretending(case, kernels=kernels_for("cpu") | {"silu": refuses})
    failure = runner.capture("auto")
    assert failure is not None and failure.startswith("rank 0: mb0/") and runner.replay is None
    assert failure.endswith("(silu): operation not permitted when stream is capturing")
    assert "set_stream" in pretend_cuda, "the capture's stream would have stayed the current one"
    load_batch(case, runner, 0)
    runner.step(1e-2)
    assert runner.loss.isfinite()
    pretend_cuda.clear()
    with pytest.raises(CinemeshError, match=r"capture is required.*\(silu\): operation not permitted"):
        runner.capture("required")


class Refusing:
    """A kernel that raises while something is captured, or always."""

    def __init__(self, asked: list[str], error: BaseException, always: bool = False) -> None:
        self.asked, self.error, self.always = asked, error, always
        self.kernel = kernels_for("cpu")["silu"]

    def __call__(self, inputs: Any, outputs: Any) -> None:
        if self.always or any(text.startswith("capture") for text in self.asked):
            raise self.error
        self.kernel(inputs, outputs)


@pytest.mark.parametrize("ends_badly", [False, True])
@pytest.mark.parametrize("error", [UserWarning("no"), CinemeshError("no"), ValueError("no"), MemoryError("no")])
def test_whatever_fails_in_a_capture_is_answered_and_put_right(
    pretend_cuda: list[str], error: Exception, ends_badly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is not given leaves the other ranks in the vote; a graph that is destroyed is still asked."""
    monkeypatch.setattr(Capturing, "ends_badly", ends_badly)
    runner = pretending(case_of("dtype=float32"), kernels=kernels_for("cpu") | {"silu": Refusing(pretend_cuda, error)})
    failure = runner.capture("auto")
    assert failure is not None and failure.endswith("(silu): no") and runner.replay is None
    begun = next(i for i, text in enumerate(pretend_cuda) if text.startswith("capture"))
    assert pretend_cuda[begun + 1 :] == ["set_stream", "endAllocateToPool (3, (0, 1))", "releasePool (3, (0, 1))"]
    assert runner.pool is not None and runner.pool.handle == (0, 2), "its pool would be taken for one being filled"
    runner.close()
    assert PretendGraph.made == _abandoned[-1:] and not PretendGraph.made[0].was_reset


def test_a_pool_that_the_capture_let_go_of_is_not_released_twice(
    pretend_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Python failed and the capture itself ended well: torch says so, and the graph releases the pool."""

    def not_recording(*_: object) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", not_recording)
    kernels = kernels_for("cpu") | {"silu": Refusing(pretend_cuda, ValueError("no"))}
    assert pretending(case_of("dtype=float32"), kernels=kernels).capture("auto") is not None
    assert not any("releasePool" in text for text in pretend_cuda)


@pytest.mark.parametrize("ends_badly", [False, True])
def test_ctrl_c_in_a_capture_ends_the_process(
    pretend_cuda: list[str], ends_badly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Capturing, "ends_badly", ends_badly)
    kernels = kernels_for("cpu") | {"silu": Refusing(pretend_cuda, KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        pretending(case_of("dtype=float32"), kernels=kernels).capture("auto")
    assert "set_stream" in pretend_cuda


def test_what_fails_in_the_warm_up_ends_the_process(pretend_cuda: list[str]) -> None:
    """Voting would wait for ranks that wait for this one's collectives."""
    kernels = kernels_for("cpu") | {"silu": Refusing(pretend_cuda, ValueError("no kernel image"), always=True)}
    with pytest.raises(ValueError, match="no kernel image"):
        pretending(case_of("dtype=float32"), kernels=kernels).capture("auto")


def captured_where_rank_1_fails(case: Case) -> tuple[str | None, bool, bool]:
    """(Why none replays, whether this rank replays, whether the eager step still runs), of this rank."""
    with pytest.MonkeyPatch.context() as patch:
        asked, mesh = pretend(patch), Mesh(case.plan)
        kernels = dict(kernels_for("cpu"))
        if mesh.rank == 1:
            kernels["silu"] = Refusing(asked, CinemeshError("no such tile", remedy="tune"))
        runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed, kernels=kernels)
        runner.initialise(weights.probe_values(case.seed))
        runner.executor.device = "cuda"
        # What stands for the capture here runs the step: an op that fails would leave the others in its collectives.
        taken = [record for record in runner.executor.records if record.op.kind == "silu"][:1]
        patch.setattr(runner.executor, "records", taken)
        patch.setattr(GraphPool, "warm_up", lambda self, executor: None)
        failure = runner.capture("auto")
        patch.undo()
        asked.clear()
        load_batch(case, runner, 0)
        runner.executor.run()
        finite, replays = bool(runner.loss.isfinite()), runner.replay is not None
    mesh.before_close.clear()
    mesh.close()
    return failure, replays, finite


def test_a_rank_that_fails_by_any_error_keeps_all_from_the_graph(pool: Pool) -> None:
    """A CinemeshError left the vote, and the others in it until the group's time-out."""
    case = small_case(Plan.parse("tp=2,dp_shard=2", dtype="float32"))
    answers = pool.run(4, captured_where_rank_1_fails, case)
    assert len({failure for failure, _, _ in answers}) == 1
    for failure, replays, finite in answers:
        assert failure is not None and failure.startswith("rank 1: ") and failure.endswith("(silu): no such tile; tune")
        assert not replays and finite
