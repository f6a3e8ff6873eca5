"""CUDA Graph capture. What needs no GPU is tested everywhere; the rest is marked ``gpu`` and runs on one device.

With one GPU, collectives are captured over communicators of size one: NCCL makes a copy of each that has a place of its
own, so that their number, their branches and their order can be counted in the graph.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.cuda import nccl

from cinemesh.errors import CinemeshError
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.cluster.marks import Marks
from cinemesh.launch.proof.parity import OPTIMIZER, Case, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model import weights
from cinemesh.model.blueprint import Blueprint
from cinemesh.model.buckets import BucketRunner
from cinemesh.model.config import CAPTION_DROPOUT
from cinemesh.model.runner import StepRunner, capture_graph
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.communicators import GROUPS, communicator_name
from cinemesh.parallel.ir.nccl_stack import Capture, NcclStack
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.liveness import persistent
from cinemesh.parallel.passes.prefetch import prefetch
from cinemesh.parallel.passes.recompute import rematerialize
from cinemesh.parallel.runtime.comm import Communicator, nccl_stack, set_up_nccl
from cinemesh.parallel.runtime.executor import Executor
from cinemesh.parallel.runtime.graph import Graph, GraphPool, refuse
from cinemesh.parallel.runtime.ledger import expected
from cinemesh.parallel.runtime.mesh import Mesh, coordinates

if TYPE_CHECKING:
    from harness import Pool  # a process of its own does not find it

STEPS = 20

# -- without a GPU ----------------------------------------------------------------------------------------------------


def test_a_refusal_names_the_op_and_the_remedy() -> None:
    message = str(refuse("rank 0: mb0/x (silu): no"))
    assert "rank 0: mb0/x (silu): no; mend the op, or set capture to auto or off" in message


def of_machine(monkeypatch: pytest.MonkeyPatch, release: tuple[int, ...], driver: int) -> None:
    """What NCCL and the driver answer that they are: (2, 28, 9) and 12080."""

    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, answer: Any) -> None:
            answer._obj.value = driver

    monkeypatch.setattr(nccl, "version", lambda: release)
    monkeypatch.setattr(ctypes, "CDLL", Library)


@pytest.mark.parametrize("version", [(2, 26, 2), (3, 0, 0)])
def test_nccl_is_told_to_keep_the_order_of_launches(version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of_machine(monkeypatch, version, 12080)
    for name in ("NCCL_LAUNCH_ORDER_IMPLICIT", "NCCL_GRAPH_REGISTER", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    set_up_nccl()
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"
    assert "NCCL_GRAPH_REGISTER" not in os.environ
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    set_up_nccl()
    assert os.environ["NCCL_GRAPH_REGISTER"] == "0"


def test_an_nccl_that_keeps_no_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of_machine(monkeypatch, (2, 25, 1), 13000)
    with pytest.raises(CinemeshError, match=r"NCCL 2\.25 < 2\.26, which keeps the order"):
        set_up_nccl()


def test_nccl_and_driver_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    of_machine(monkeypatch, (2, 28, 9), 12080)
    assert nccl_stack() == NcclStack((2, 28), (12, 8))


def why_no_capture(drivers: list[int], mode: Capture) -> str | None:
    """What rank 0 or 1, each with its own driver, hears of the capture that it was about to begin."""
    mesh = Mesh(Plan.parse("tp=2"))
    pool = mock.Mock(warm_up=mock.Mock(side_effect=NotImplementedError))  # the capture begins
    with pytest.MonkeyPatch.context() as patch:
        of_machine(patch, (2, 28, 9), drivers[mesh.rank])
        try:
            _, failure = capture_graph(mock.Mock(), pool, mesh, mode)
        except NotImplementedError:
            return None
        finally:
            mesh.close()
    return failure


@pytest.mark.parametrize(
    ("drivers", "mode", "captures"),
    [
        ([12080, 12080], "auto", False),
        ([12080, 12080], "required", True),
        ([12090, 13000], "auto", True),
        ([13000, 12080], "auto", False),  # one rank's driver: a rank that captures alone waits for ever
        ([12020, 12020], "auto", True),  # uncaptured they run one after another just the same
    ],
)
def test_steps_are_not_captured_where_that_alone_loses_the_overlap(
    drivers: list[int], mode: Capture, captures: bool, pool: Pool
) -> None:
    for failure in pool.run(2, why_no_capture, drivers, mode):
        assert failure is None if captures else failure is not None and "NCCL 2.28 on a driver of CUDA 12.8" in failure


def test_graphs_are_given_back_before_the_process_groups() -> None:
    """By the mesh itself: no order of calls in a trainer can get it wrong."""
    order: list[str] = []

    class Groups(dict[Any, Any]):
        def clear(self) -> None:
            order.append("groups")

    mesh = object.__new__(Mesh)
    mesh.before_close, mesh._groups = [lambda: order.append("graphs")], Groups()
    mesh.close()
    mesh.close()
    assert order == ["graphs", "groups", "groups"]


# -- with one ---------------------------------------------------------------------------------------------------------


def case_of(text: str, head_dim: int = 8) -> Case:
    return small_case(Plan.parse(text), head_dim=head_dim)


def runner_of(case: Case, package: str | None = None) -> StepRunner:
    """With kernels that sum in one fixed order, so that two runs of a step can be compared bitwise.

    ``package``: of every op that it has a kernel for.
    """
    kernels = kernels_for("cuda", {"all": package} if package else None, deterministic=True)
    options = {"seed": case.seed, "device": "cuda", "kernels": kernels}
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, **options)
    runner.initialise(weights.probe_values(case.seed))
    return runner


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("text", "head_dim", "package"),
    [
        ("dtype=float32", 8, None),  # attention by the reference
        ("dtype=float32", 64, "triton"),
        ("dtype=float32,recompute=none", 128, "triton"),
        ("dtype=bf16,micro_batches=2,recompute=full", 64, None),  # by what the registry thinks fastest
        ("dtype=bf16,micro_batches=2,recompute=full", 128, "triton"),
    ],
)
def test_replay_is_bitwise_the_eager_step(text: str, head_dim: int, package: str | None) -> None:
    """Learning rate, t, noise and samples change every step; a value that capture froze would differ from step 1 on."""
    case = case_of(text, head_dim)
    eager, replayed = runner_of(case, package), runner_of(case, package)
    assert replayed.capture("required") is None and isinstance(replayed.replay, Graph)
    for step in range(STEPS):
        for runner in (eager, replayed):
            load_batch(case, runner, step)
            runner.step(1e-2 / (step + 1))
        for name in persistent(eager.program):
            assert torch.equal(eager.executor.buffers[name], replayed.executor.buffers[name]), f"step {step}: {name}"
    replayed.close()


@pytest.mark.gpu
def test_activations_go_to_the_host_and_back_inside_a_graph() -> None:
    """Eager and replayed, a step that offloads is bitwise one that keeps: only a GPU has copies that may come late."""
    kept, away = case_of("dtype=bf16,recompute=none"), case_of("dtype=bf16,recompute=none,offload=gate:up:q:x0")
    eager, gone, replayed = runner_of(kept), runner_of(away), runner_of(away)
    assert replayed.capture("required") is None
    assert gone.executor.host.arena.is_pinned()
    for step in range(5):
        for case, runner in ((kept, eager), (away, gone), (away, replayed)):
            load_batch(case, runner, step)
            runner.step(1e-2)
        for name in ("master", "loss"):
            for other in (gone, replayed):
                assert torch.equal(eager.buffers[name], other.buffers[name]), f"step {step}: {name}"
    replayed.close()


@pytest.mark.gpu
def test_a_replay_tells_where_it_stands_while_it_runs() -> None:
    """A kernel that takes seconds: meanwhile the host reads, from memory that a watchdog shares, the mark before it."""
    from cinemesh.launch.training.marked import slot_of  # needs packages that a machine of kernels alone may lack

    case = case_of("dtype=float32")
    plain, marks = runner_of(case), Marks()
    slot = slot_of(marks, "cuda")
    swiglu = plain.executor.kernels["swiglu"]

    def slow(inputs: Any, outputs: Any) -> None:
        torch.cuda._sleep(2 * 10**9)
        swiglu(inputs, outputs)

    kernels = {**plain.executor.kernels, "swiglu": slow}
    options = {"seed": case.seed, "device": "cuda", "kernels": kernels, "slot": slot}
    marked = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, **options)
    marked.initialise(weights.probe_values(case.seed))
    assert marked.capture("required") is None
    for runner in (plain, marked):
        load_batch(case, runner, 0)
    ops = marked.program.ops
    hung = next(i for i, op in enumerate(ops) if op.kind == "swiglu")
    before = max(i for i, op in enumerate(ops[:hung]) if op.kind == "mark")
    torch.cuda.synchronize()
    marks.run(0, len(ops))
    marked.step(1e-2)
    until = time.monotonic() + 10
    while marks.place.record <= before and time.monotonic() < until:
        time.sleep(0.01)
    assert marks.place.record == before + 1, "behind the last mark before it, and no further"
    torch.cuda.synchronize()
    assert marks.place.record == len(ops)
    plain.step(1e-2)
    assert all(torch.equal(plain.buffers[name], marked.buffers[name]) for name in plain.buffers)
    marked.close()


@pytest.mark.gpu
def test_replay_allocates_nothing() -> None:
    case = case_of("dtype=bf16")
    runner = runner_of(case)
    runner.capture("required")
    load_batch(case, runner, 0)
    runner.step(1e-2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        runner.step(1e-2)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    runner.close()


@pytest.mark.gpu
def test_two_buckets_share_one_arena_and_one_pool() -> None:
    case = case_of("dtype=float32")
    t, h, w = case.latent
    batches = [case.batch, replace(case.batch, latent=(t, h, w // 2))]
    facts = (OPTIMIZER, case.seed, CAPTION_DROPOUT, "nccl", False)
    runner = BucketRunner([Blueprint(case.config, case.plan, b, *facts) for b in batches], None, device="cuda")
    assert runner.capture("required") is None
    small, large = (runner.runners[b.latent] for b in reversed(batches))
    assert small.pool is large.pool and small.executor.arena is large.executor.arena
    assert "2 captured steps" in runner.report()
    large.close()


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_falls_back_with_its_name() -> None:
    case = case_of("dtype=float32")
    runner = runner_of(case)
    kernel = runner.executor.kernels["silu"]

    def reads_back(inputs: Any, outputs: Any) -> None:
        kernel(inputs, outputs)
        outputs[0].sum().item()

    kernels = {**runner.executor.kernels, "silu": reads_back}
    options = {"seed": case.seed, "device": "cuda", "kernels": kernels}
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, **options)
    runner.initialise(weights.probe_values(case.seed))
    failure = runner.capture("auto")
    assert failure is not None and "(silu)" in failure and runner.replay is None
    load_batch(case, runner, 0)
    runner.step(1e-2)
    assert runner.loss.isfinite()


@pytest.mark.gpu
def test_a_step_larger_than_the_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    with pytest.raises(CinemeshError, match=r"more than the 0\.00 GB that are left"):
        runner_of(case_of("dtype=float32"))


class LoneMesh(Mesh):
    """Every communicator that the program names, each of this one rank."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rank, self.coordinates = plan, 0, coordinates(plan, 0)
        self.before_close = []
        self._groups = {name: self._lone(name) for name in starmap(communicator_name, GROUPS)}

    def _lone(self, name: str) -> dist.ProcessGroup:
        group = dist.new_group([0], backend="nccl", group_desc=name)
        assert isinstance(group, dist.ProcessGroup)
        return group


@pytest.fixture
def nccl_group(tmp_path: Path) -> Iterator[None]:
    set_up_nccl()
    store = dist.FileStore(str(tmp_path / "store"), 1)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_collectives(case: Case) -> Program:
    """Nothing is elided: every collective of the plan runs, over one rank."""
    return prefetch(rematerialize(build_step(case.config, case.plan, case.batch, OPTIMIZER)))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:DEBUG")  # of the dump itself
@pytest.mark.usefixtures("nccl_group")
@pytest.mark.parametrize(
    "text", ["prefetch=1", "recompute=full,prefetch=2,micro_batches=2", "recompute=none,prefetch=0"]
)
def test_every_collective_is_in_the_graph(text: str, tmp_path: Path) -> None:
    """Counts, branches and order of the captured graph, read from its dump."""
    case = small_case(Plan.parse(text, dtype="float32"))
    mesh = LoneMesh(case.plan)
    program = with_collectives(case)
    executor = Executor(program, mesh.coordinates, Communicator(mesh), "cuda")
    pool = GraphPool("cuda")
    pool.warm_up(executor)
    graph, failure = pool.capture(executor, keep=True)
    assert graph is not None, failure
    graph.graph.debug_dump(str(tmp_path / "graph.dot"))
    dump = (tmp_path / "graph.dot").read_text()
    edges = re.findall(r'"([^"]+)"\s*->\s*"([^"]+)"', dump)
    nodes = re.split(r'\n(?=\s*"[^"]+"\s*\[)', dump)
    followers, waiters = Counter(a for a, _ in edges), Counter(b for _, b in edges)
    moves = sum(entry.kind != "all_reduce" for entry in expected(program))  # an all-reduce in place copies nothing
    assert moves > 0 and sum("MEMCPY" in node for node in nodes) >= moves
    if case.plan.prefetch:
        assert max(followers.values()) > 1, "no branch: every collective was put in line with compute"
        assert max(waiters.values()) > 1, "no join: compute does not wait for a collective"
    assert len(edges) >= len({*followers, *waiters}) - 1, "a part of the step hangs on nothing"
    graph.run()
    torch.cuda.synchronize()
    pool.close()
    mesh.close()


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("graph_tests", {path!r})
module = sys.modules["graph_tests"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.{call}
print("ended")
"""


def started(call: str) -> subprocess.Popen[str]:
    """A process of its own that makes one call to a function of this file: what CUDA has begun survives no fork."""
    script = LOAD.format(path=__file__, call=call)
    return subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=subprocess.STDOUT, text=True)


def ended(processes: list[subprocess.Popen[str]]) -> None:
    """Refuses a process that failed, or that still hangs after five minutes."""
    try:
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0 and said.endswith("ended\n"), said
    finally:
        for process in processes:
            process.kill()


def test_a_process_of_its_own_finds_this_file() -> None:
    ended([started("STEPS")])
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        ended([started("STEPS / 0")])


def capture_and_close(store: str) -> None:
    """A captured step whose communicators are still in a graph when the mesh closes."""
    set_up_nccl()
    meeting = dist.FileStore(store, 1)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl", store=meeting, rank=0, world_size=1)
    case = case_of("dtype=float32")
    mesh = LoneMesh(case.plan)
    executor = Executor(with_collectives(case), mesh.coordinates, Communicator(mesh), "cuda")
    pool = GraphPool("cuda")
    mesh.before_close.append(pool.close)
    pool.warm_up(executor)
    graph, failure = pool.capture(executor)
    assert graph is not None, failure
    graph.run()
    mesh.close()
    dist.destroy_process_group()


@pytest.mark.gpu
def test_teardown_leaves_no_hang(tmp_path: Path) -> None:
    ended([started(f"capture_and_close({str(tmp_path / 'store')!r})")])


def on_device(rank: int, devices: int, store: str, text: str) -> None:
    """One rank of :func:`test_replay_on_all_devices`: raises what it finds."""
    torch.cuda.set_device(rank)
    set_up_nccl()
    meeting = dist.FileStore(store, devices)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl", store=meeting, rank=rank, world_size=devices)
    case = small_case(Plan.parse(text, dtype="bf16"), head_dim=64)
    mesh = Mesh(case.plan)
    options = {"seed": case.seed, "device": f"cuda:{rank}"}
    eager, replayed = (StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, **options) for _ in range(2))
    for runner in (eager, replayed):
        runner.initialise(weights.probe_values(case.seed))
    assert replayed.capture("required") is None
    for step in range(STEPS):
        for runner in (eager, replayed):
            load_batch(case, runner, step)
            runner.step(1e-2 / (step + 1))
        for name in persistent(eager.program):
            assert torch.equal(eager.executor.buffers[name], replayed.executor.buffers[name]), f"step {step}: {name}"
    mesh.close()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("axes", ["tp", "cp", "dp_shard", "dp_replicate", "tp=2,cp", "tp=2,dp_shard"])
def test_replay_on_all_devices(axes: str, tmp_path: Path) -> None:
    """Real communicators, each plan in its own processes; a replay whose collectives differ would hang or differ."""
    devices = torch.cuda.device_count()
    if devices < 2 or (axes.startswith("tp=2") and devices % 4):
        pytest.skip(f"needs 2 or more GPUs (4 for two axes); there are {devices}")
    degree = devices // 2 if axes.startswith("tp=2") else devices
    store, text = str(tmp_path / "store"), f"{axes}={degree}"
    ended([started(f"on_device({rank}, {devices}, {store!r}, {text!r})") for rank in range(devices)])
