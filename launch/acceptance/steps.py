"""The plans and the steps that the stages try: every way to split, each filling the job as it is."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch

from ...kernels.registry import kernels_for
from ...model.config import preset
from ...model.runner import StepRunner
from ...model.weights import probe_values
from ...parallel.ir.plan import Plan
from ...parallel.runtime.mesh import Mesh
from ..proof import verify
from ..proof.parity import OPTIMIZER, Case
from ..proof.verify import HEAD_DIM, small_case

MOST = 8  # ranks over which tokens or heads are split
WIDE = "movie-gen-30b"  # whose blocks are timed on GPUs
WIDE_LAYERS = 4  # of its 48: a lane repeats from block to block
WIDE_LATENT = (8, 48, 48)  # 4,608 tokens: tens of ms a block on one GPU, a fraction of its memory


def device_kind(device: str) -> str:
    """``cpu`` or ``cuda``."""
    return torch.device(device).type


def plans_of(world: int, local: int) -> dict[str, Plan]:
    """By what they try: tp within a server, cp, FSDP, replicas, all of them together. What is left is dp_shard."""
    tp, cp, pair = gcd(local, MOST), gcd(world, MOST), gcd(world, 2)
    inner = gcd(local, 2)
    across = gcd(world // inner, 2)
    copies = gcd(world // (inner * across), 4) // 2 or 1  # two, where four ranks are left: they shard, too
    rest = world // (inner * across * copies)
    several = 2 if world > inner else 1  # units that are gathered, and reduced, at once
    wanted = {
        "TP": Plan(tp=tp, dp_shard=world // tp),
        "CP": Plan(cp=cp, dp_shard=world // cp),
        "FSDP": Plan(dp_shard=world),
        "replicas": Plan(dp_shard=world // pair, dp_replicate=pair),
        "all": Plan(tp=inner, cp=across, dp_shard=rest, dp_replicate=copies, prefetch=several, grad_units=several),
    }
    names: dict[Plan, str] = {}
    for name, plan in wanted.items():
        names.setdefault(plan, name)
    return {name: plan for plan, name in names.items()}


def proof_case(plan: Plan, device: str, steps: int, dtype: str | None = None) -> Case:
    """A small step whose numbers are looked at, in the most exact dtype of the device's own kernels unless told."""
    kind = device_kind(device)
    plan = replace(plan, dtype=dtype or verify.DTYPE[kind])
    return small_case(plan, max_procs=plan.world_size, steps=steps, head_dim=HEAD_DIM[kind])


def timed_case(plan: Plan, device: str, steps: int) -> Case:
    """A step whose times are looked at: on GPUs blocks of the 30B, in bf16; on CPUs the smallest one."""
    if device_kind(device) == "cpu":
        return proof_case(plan, device, steps, "float32")
    config = replace(preset(WIDE), layers=WIDE_LAYERS)
    return Case(replace(plan, dtype="bf16"), config, 1, WIDE_LATENT, steps)


def runner_of(case: Case, mesh: Mesh | None, device: str, *, deterministic: bool = False) -> StepRunner:
    """A rank's runner of a case, its weights as noise. ``deterministic``: only kernels that sum in one order."""
    kernels = kernels_for(device, deterministic=deterministic)
    runner = StepRunner(
        case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed, device=device, kernels=kernels
    )
    runner.initialise(probe_values(case.seed))
    return runner


def fill_inputs(runner: StepRunner, seed: int) -> None:
    """Samples of usual values into the step's buffers, this rank's part alone: a whole batch is of many ranks."""
    for given in runner.program.inputs:
        if given.micro_batch is None:
            continue
        buffer = runner.executor.buffers[given.buffer]
        if buffer.dtype == torch.bool:
            buffer.fill_(True)
        elif buffer.dtype == torch.int64:
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
        else:
            buffer.normal_(generator=torch.Generator(buffer.device).manual_seed(seed))
