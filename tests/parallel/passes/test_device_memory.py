"""What a device holds, counted once: workspaces of the kernels that run, what no program owns, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels.registry import kernels_for
from cinemesh.kernels.selection import Software
from cinemesh.launch.proof.parity import OPTIMIZER
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.blueprint import Blueprint
from cinemesh.model.buckets import BucketRunner
from cinemesh.model.config import CAPTION_DROPOUT, USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.runner import StepRunner
from cinemesh.model.sampler import Sampler
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.arena import place
from cinemesh.parallel.passes.device_memory import (
    BLAS_STREAM_BYTES,
    COMMUNICATOR_BYTES,
    GRAPH_BYTES,
    Workspaces,
    bytes_beside,
    check_fits,
)
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.footprint import footprint

NAME = "movie-gen-30b"
FITS = "tp=4,cp=2,dp_shard=768,recompute=full"
CASE = small_case(Plan(dtype="float32"), "tiny", max_procs=1)


def movie_gen(text: str, layers: int = 48) -> Program:
    config = replace(preset(NAME), layers=layers)
    return prepare(build_step(config, Plan.parse(text), BatchShape(1, USUAL_LATENTS[NAME])), backend="nccl")


def test_a_step_too_large_for_the_card_says_by_how_much() -> None:
    program = movie_gen("tp=4,cp=2,dp_shard=768")
    with pytest.raises(CinemeshError, match=r"GB more than the 80\.00 GB that are left.*[Rr]ecompute.*full") as caught:
        check_fits(program, 80 * 10**9)
    assert "workspace" in str(caught.value)
    lives = lifetimes(program)
    needed = lives.persistent_bytes + place(program).total_bytes + max(lives.workspace_bytes)
    check_fits(program, needed)
    with pytest.raises(CinemeshError, match=r"0\.00 GB more than"):
        check_fits(program, needed - 1)
    check_fits(program, needed + 7, beside={"NCCL": 7})
    with pytest.raises(CinemeshError):
        check_fits(program, needed + 6, beside={"NCCL": 7})
    states = list(program.states.values())
    held = sum(map(program.bytes, states)) + place(program).total_bytes
    check_fits(program, needed - held, shared=states, arena_bytes=held)
    with pytest.raises(CinemeshError):
        check_fits(program, needed - held - 1, shared=states, arena_bytes=place(program).total_bytes)
    check_fits(movie_gen(FITS), 80 * 10**9)


@pytest.mark.parametrize("package", ["triton", "torch", "cudnn"])
def test_the_workspace_is_that_of_the_kernel_that_runs(package: str) -> None:
    """By closed forms. The CPU's kernels cast both factors of a product with a result in fp32; cuBLAS does not."""
    program = movie_gen(FITS, layers=2)
    overrides = {"attention": package, "attention_backward": package}
    on = Workspaces("sm_90", Software(overrides=overrides))
    tokens, heads, keys, dim = 36_864, 12, 73_728, 128
    rows = tokens * heads
    outputs = rows * (dim * 2 + 4)
    backward = rows * (8 + 4 * dim) + (rows + 2 * keys * heads) * dim * 2
    wanted = {
        "attention": 0 if package == "triton" else outputs,
        "attention_backward": {"triton": 4 * rows, "torch": backward, "cudnn": backward + 4 * rows}[package],
        "matmul": 0,
    }
    for kind, size in wanted.items():
        assert {on.bytes(program, op) for op in program.ops if op.kind == kind} == {size}
    products = [op for op in program.ops if op.kind == "matmul"]
    assert max(program.workspace_bytes(op) for op in products) > 4 * 10**8
    cpu = Workspaces("cpu")
    assert all(cpu.bytes(program, op) == program.workspace_bytes(op) for op in program.ops)


def test_a_plain_form_takes_what_the_op_table_says_and_a_fused_record_what_its_largest_part_does() -> None:
    program = movie_gen("tp=4,dp_shard=8,fused_tp=true", layers=1)
    on = Workspaces("sm_90", Software(overrides={"all": "reference"}))
    assert all(on.bytes(program, op) == program.workspace_bytes(op) for op in program.ops)
    assert any(op.parts for op in program.ops)


def test_what_no_program_owns() -> None:
    """A communicator of tp, cp, two of fsdp, one of the replicated unit and of the world, which is the job's own."""
    plan = Plan.parse("tp=4,cp=2,dp_shard=2")
    assert bytes_beside(plan, 5.0, graphs=3) == {
        "CUDA context": 5,
        "NCCL": 6 * 288 * 2**20,
        "cuBLAS": 2 * 32 * 2**20,
        "CUDA graphs": 3 * 120 * 2**20,
    }
    assert bytes_beside(replace(plan, fused_tp=True), 0, graphs=1)["cuBLAS"] == 3 * BLAS_STREAM_BYTES
    assert sum(bytes_beside(Plan(), 0, graphs=0).values()) == 0
    for name in ("grand-teton-h100", "h200-ib400"):
        assert load(name).memory.communicator_bytes == COMMUNICATOR_BYTES


def test_planner_and_runtime_count_the_same() -> None:
    """Apart from two facts: the planner takes the record where all is most, the runtime what the packed arena takes."""
    cluster, program = load("grand-teton-h100"), movie_gen(FITS, layers=6)
    planned = footprint(program, cluster)
    beside = bytes_beside(program.plan, cluster.memory.context_bytes, graphs=1)
    assert {name: planned.by_class[name] for name in beside} == beside
    on = Workspaces("sm_90")
    check_fits(program, int(1.02 * planned.peak_bytes), on.bytes, beside=beside)
    with pytest.raises(CinemeshError):
        check_fits(program, planned.peak_bytes - 1, on.bytes, beside=beside)
    more = footprint(program, cluster, graphs=4)
    assert more.peak_bytes - planned.peak_bytes == 3 * GRAPH_BYTES


# -- on a device that is pretended: what is refused there is refused before anything is allocated ----------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that a pretended H100 has free."""
    left = [0]
    for name, value in {
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (left[0], 80 * 10**9),
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return left


def refusal(make: object) -> str | None:
    """The message; None where it came to an allocation, which this torch cannot do or the pretended device does not."""
    assert callable(make)
    try:
        make()
    except CinemeshError as error:
        return str(error)
    except (AssertionError, RuntimeError) as error:
        assert "CUDA" in str(error), error  # what torch says where it has none
    return None


def needed(program: Program, graphs: int) -> int:
    on = Workspaces("sm_90")
    lives = lifetimes(program, workspace=on.bytes)
    beside = sum(bytes_beside(program.plan, 0, graphs=graphs).values())
    return lives.persistent_bytes + place(program).total_bytes + max(lives.workspace_bytes) + beside


@pytest.mark.skipif(torch.cuda.is_available(), reason="a pretended device")
def test_a_runner_is_refused_at_the_byte_with_all_that_is_still_to_come(free: list[int]) -> None:
    program = prepare(build_step(CASE.config, CASE.plan, CASE.batch, OPTIMIZER), backend="nccl")

    def make() -> None:
        StepRunner(CASE.config, CASE.plan, CASE.batch, OPTIMIZER, None, device="cuda", program=program)

    free[0] = needed(program, graphs=1)
    assert refusal(make) is None
    free[0] -= 1
    assert "cuBLAS 0.07, CUDA graphs 0.13" in str(refusal(make))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a pretended device")
def test_a_sampler_alone_is_refused_where_nothing_is_left(free: list[int]) -> None:
    master = torch.empty(0)

    def make() -> None:
        Sampler(CASE.config, CASE.plan, CASE.batch, None, master, "cuda")

    free[0] = 1000
    assert "GB more than the 0.00 GB that are left" in str(refusal(make))


def test_steps_beside_each_other_count_each_others_graphs() -> None:
    batches = [CASE.batch, replace(CASE.batch, latent=(1, 4, 4))]
    facts = (OPTIMIZER, CASE.seed, CAPTION_DROPOUT, "gloo", False)
    runners = BucketRunner([Blueprint(CASE.config, CASE.plan, batch, *facts) for batch in batches], None)
    assert sorted(runner.graphs for runner in runners.runners.values()) == [1, 2]
    one, two = runners.runners.values()
    assert one.executor.arena is two.executor.arena and one.buffers["master"] is two.buffers["master"]


def test_a_sampler_beside_a_runner_takes_its_arena_kernels_and_communicators() -> None:
    """It had an arena of its own while the run's states, arena and graphs were alive: 2.4 GB more for the 30B."""
    kernels = kernels_for("cpu", {"attention": "reference"})
    runner = StepRunner(CASE.config, CASE.plan, CASE.batch, OPTIMIZER, None, kernels=kernels)
    sampler = Sampler(CASE.config, CASE.plan, CASE.batch, None, runner.buffers["ema"], beside=runner)
    for executor in (sampler.velocity, sampler.unpatchify):
        assert executor.arena is runner.executor.arena and executor.kernels is runner.executor.kernels
    alone = Sampler(CASE.config, CASE.plan, CASE.batch, None, runner.buffers["ema"])
    assert alone.unpatchify.arena is alone.velocity.arena
