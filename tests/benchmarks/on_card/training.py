"""Stage 7: training at the 30B's width: 2 blocks, 30 captured steps on a synthetic latent, saved and resumed.

The loss falls, the allocator is flat, MFU stands beside the prediction. Resumed: after the states were overwritten, a
checkpoint brings back every bit of them, and the next step's loss is bitwise what it was. (Weights after that step are
bitwise the same only with kernels that sum in one fixed order; the registry's choice need not.)
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.on_card.cases import samples, trained
from benchmarks.on_card.machine import driver
from benchmarks.on_card.stage import Here, cluster_of
from torch import Tensor

from cinemesh.launch.acceptance.steps import fill_inputs
from cinemesh.launch.training.checkpoint.loading import load
from cinemesh.launch.training.checkpoint.manifest import COUNTERS, SAVED_STATES
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer
from cinemesh.model.weights import initial_values
from cinemesh.parallel.ir.flops import model_flops
from cinemesh.perf_model.prices.played import play_program

STEPS, SMOKE_STEPS = 30, 6
SETTLED = 3  # steps before what is timed
BARE = 5  # steps in a row between which nothing is read: they must allocate nothing
LR = 3e-5  # Adam moves an output of 6,144 inputs by some 0.15 a step; at ten times that the loss rises
SEED = 0


def run(here: Here) -> None:
    case = trained(here.smoke)
    runner = StepRunner(case.config, case.plan, case.batch, Optimizer(), None, device=here.place)
    begun = time.monotonic()
    runner.initialise(initial_values(SEED))
    torch.cuda.synchronize()
    here.note(initialised_s=round(time.monotonic() - begun, 2))
    here.note(capture=runner.capture() or "captured")
    fill(runner)  # behind the capture, which is made on samples of NaN
    losses, seconds = train(here, runner, SMOKE_STEPS if here.smoke else STEPS)
    cluster = cluster_of(here, torch.cuda.get_device_name())
    played = play_program(runner.program, case.batch, cluster)
    flops_per_s = cluster.gpu.peak_flops[case.plan.compute_dtype]
    step_s = statistics.median(seconds[SETTLED:])

    def rates(step_s: float, peak_bytes: int) -> dict[str, float | None]:
        mfu = model_flops(runner.program) / step_s / flops_per_s
        tokens_per_s = case.batch.samples * case.config.tokens(case.batch.latent) / step_s
        return {"step_s": step_s, "mfu": mfu, "tokens_per_s": tokens_per_s, "peak_bytes": peak_bytes}

    free, whole = torch.cuda.mem_get_info()
    here.beside("training", rates(played.step_s, played.footprint.peak_bytes), rates(step_s, whole - free))
    here.note(losses=losses, loss_falls=falls(losses), finite=all(loss == loss for loss in losses), behind=driver())
    here.note(allocations_of_bare_steps=allocations(runner), resumed=resumed(here, runner))
    runner.close()


def fill(runner: StepRunner) -> None:
    """A latent of one colour: noise could not be learnt in so few steps."""
    fill_inputs(runner, SEED)
    for name, buffer in samples(runner):
        if name == "latents":
            buffer.copy_(buffer[:, :, :1, :1, :1].clone().expand_as(buffer))


def train(here: Here, runner: StepRunner, steps: int) -> tuple[list[float], list[float]]:
    """Loss and seconds of every step. The sample stays; t, noise and caption dropout are each step's own."""
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(steps):
        begun = time.perf_counter()
        runner.step(LR)
        losses.append(runner.loss.item())
        seconds.append(time.perf_counter() - begun)
        here.note(steps=len(losses))
    return losses, seconds


def falls(losses: list[float]) -> bool:
    """The mean of the last third below that of the first."""
    part = len(losses) // 3
    return statistics.fmean(losses[-part:]) < statistics.fmean(losses[:part])


def allocations(runner: StepRunner) -> int:
    """What ``BARE`` steps asked of the allocator: 0 when all lies in the arena and the graph."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(BARE):
        runner.step(LR)
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["allocation.all.allocated"] - before


def resumed(here: Here, runner: StepRunner) -> dict[str, Any]:
    """A checkpoint of all states, written and read back over states that were overwritten."""
    found: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(dir=here.folder))
    try:
        begun = time.monotonic()
        path = save(folder, runner)
        found["save_s"] = round(time.monotonic() - begun, 2)
        saved = {name: bits(runner.buffers[name]) for name in (*SAVED_STATES, COUNTERS)}
        runner.step(LR)
        loss = runner.loss.item()
        for name in saved:
            runner.buffers[name].zero_()
        begun = time.monotonic()
        load(path, runner)
        found["load_s"] = round(time.monotonic() - begun, 2)
        found["states_bitwise"] = saved == {name: bits(runner.buffers[name]) for name in saved}
        runner.step(LR)
        found["next_loss_bitwise"] = runner.loss.item() == loss
    finally:
        shutil.rmtree(folder)
    return found


def bits(state: Tensor) -> tuple[int, int]:
    """A sum over the bits of a state, and one in which places count: no two differing states meet in both by chance."""
    words = state.view(-1).view(torch.int32)
    total = weighed = 0
    for i, part in enumerate(words.split(1 << 26)):
        wide = part.to(torch.int64)
        total += int(wide.sum())
        weighed += int((wide * (torch.arange(part.numel(), device=part.device) % 65521 + i + 1)).sum())
    return total, weighed
