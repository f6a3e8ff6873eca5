"""Whole trainings of the quick start beside one another: the loss of every step, and where the runs end.

    python tests/benchmarks/training_curves.py fsdp2 [--steps 700] [--json results.json] [--picture curves.png]
    python tests/benchmarks/training_curves.py bf16  [--steps 700] [--json results.json] [--picture curves.png]

``fsdp2``: four gloo processes train the same model on the same batches three times, in turns, step by step: cinemesh
under tp=2, cp=2; torch's own FSDP2 over four ranks, with its AdamW and its clipping, on the plain autograd model; and
FSDP2 again from weights of which each is one float32 rounding away. The third says how far two runs drift apart that
differ in nothing but the first rounding: Adam divides by what it rounds. cinemesh has to follow FSDP2 that closely.

``bf16``: the quick start as the README runs it, in float32 and in bf16, from three seeds each: where those in bf16 end,
they have to lie within the spread of those in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

from cinemesh.data.batches import BatchHistory
from cinemesh.data.cache.drawn import Drawn
from cinemesh.data.cache.samples import CaptionDraw, collate
from cinemesh.launch.cluster.processes import Joined, forked
from cinemesh.launch.progress import progress
from cinemesh.launch.training.feed import run_order
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.recipe import Config, read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.model import weights
from cinemesh.model.config import parameters
from cinemesh.model.reference import Block, Reference, training_loss
from cinemesh.model.runner import Batch, StepRunner
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.comm import sum_over_ranks
from cinemesh.parallel.runtime.mesh import Mesh

RECIPE = Path("configs/quickstart.yaml")
RANKS = 4
PLAN = Plan(tp=2, cp=2, dtype="float32", recompute="none")
SEEDS = (0, 1, 2)
SIDES = ("cinemesh", "fsdp2", "rounded")


class TorchRun:
    """The plain autograd model under FSDP2, on this rank's part of the global batch."""

    def __init__(self, setting: Setting, *, roundings: int) -> None:
        """Initial weights are moved by ``roundings`` of float32, up or down by turns."""
        self.config, self.rank = setting.config, torch.distributed.get_rank()
        self.model = Reference(setting.model)
        table = parameters(setting.model)
        initial = weights.full(table, weights.initial_values(self.config.seed), torch.float32)
        for value in initial.values():
            up = torch.where(torch.arange(value.numel()).view(value.shape) % 2 == 0, math.inf, -math.inf)
            for _ in range(roundings):
                value.copy_(torch.nextafter(value, up))
        self.model.load_state_dict(initial)
        for block in self.model.blocks:
            assert isinstance(block, Block)
            fully_shard(block)
        fully_shard(self.model)
        named, optimizer = dict(self.model.named_parameters()), self.config.optimizer
        groups = [
            {"params": [named[p.name] for p in table if p.decay == decay], "weight_decay": rate}
            for decay, rate in ((True, optimizer.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps)

    def step(self, batch: Batch, step: int, lr: float) -> float:
        """The loss of the global batch before the update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = training_loss(self.model, batch, self.config.seed, step, self.config.caption_dropout)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        return sum_over_ranks(loss.detach()).item() / RANKS


def follow(recipe: Config, steps: int) -> dict[str, list[float]]:
    """The loss of the first ``steps`` of each of ``SIDES``; runs on every rank."""
    rank, mesh = torch.distributed.get_rank(), Mesh(PLAN)
    setting = Setting.of(replace(recipe, plan=PLAN))
    config, size = setting.config, recipe.data.global_batch
    batches = BatchHistory.always((size,))
    drawn = Drawn(run_order(config, batches), open_history(setting, Joined(rank, "cpu", mesh)))
    ours = StepRunner(
        setting.model, PLAN, setting.batches[0], config.optimizer, mesh,
        seed=config.seed, caption_dropout=config.caption_dropout,
    )  # fmt: skip
    ours.initialise(weights.initial_values(config.seed))
    ours.capture("required")
    torch_runs = {side: TorchRun(setting, roundings=roundings) for side, roundings in (("fsdp2", 0), ("rounded", 1))}
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    with progress("training", steps, silent=rank > 0) as begin:
        for step in range(steps):
            begin(f"step {step + 1}")
            samples, lr = (
                drawn.at(step).train.select(drawn.indices(step), CaptionDraw(config.seed, step, 0)),
                config.schedule.lr(config.optimizer.lr, step),
            )
            ours.load(0, collate(samples, 0, 1))
            ours.step(lr)
            losses["cinemesh"].append(ours.loss.item())
            for side, run in torch_runs.items():
                losses[side].append(run.step(collate(samples, rank, RANKS), step, lr))
    mesh.close()
    return losses


def drift(losses: Sequence[float], of: Sequence[float]) -> list[float]:
    """The largest relative difference of a step's loss so far."""
    worst, found = 0.0, []
    for a, b in zip(losses, of, strict=True):
        worst = max(worst, abs(a / b - 1.0))
        found.append(worst)
    return found


def fsdp2(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = read_config(RECIPE, [f"data.cache={folder}"])
        losses = forked(RANKS, lambda: follow(recipe, arguments.steps))[0]
    drifts = {side: drift(losses[side], losses["fsdp2"]) for side in ("cinemesh", "rounded")}
    print(f"{'steps':>6}{'loss':>10}{'cinemesh':>12}{'rounded':>12}   largest relative difference from FSDP2 so far")
    for step in [step for step in (1, 2, 5, 10, 20, 50, 100, 200, 400, arguments.steps) if step <= arguments.steps]:
        both = "".join(f"{drifts[side][step - 1]:12.1e}" for side in drifts)
        print(f"{step:6}{losses['fsdp2'][step - 1]:10.4f}{both}")
    return {"plan": PLAN.equation(), "losses": losses, "drift": drifts}


def bf16(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs ``cinemesh train``, as a user does. Runs that the results have already are taken from there."""
    kept = arguments.json
    runs: dict[str, dict[str, Any]] = json.loads(kept.read_text())["runs"] if kept and kept.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, seed in [(dtype, seed) for seed in SEEDS for dtype in ("float32", "bf16")]:
            name = f"{dtype}, seed {seed}"
            if name in runs:
                continue
            run = Path(folder, f"{dtype}-{seed}")
            changed = {
                "seed": seed, "plan.dtype": dtype, "schedule.steps": arguments.steps, "data.cache": f"{folder}/cache",
                "logging.directory": run, "logging.every": 1, "sample": "null",
            }  # fmt: skip
            sets = [word for key, value in changed.items() for word in ("--set", f"{key}={value}")]
            command = [sys.executable, "-m", "cinemesh.launch", "train", str(RECIPE), "--nproc", "2", *sets]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rows = read_metrics(run)
            runs[name] = {
                "losses": [row["loss"] for row in rows if "loss" in row],
                "validation": {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row},
            }
    for what, of in (("best validation loss", _best), ("validation loss at the end", _end), ("training loss", _last)):
        ends = {dtype: [of(runs[f"{dtype}, seed {seed}"]) for seed in SEEDS] for dtype in ("float32", "bf16")}
        shown = "; ".join(f"{dtype} " + ", ".join(f"{end:.4f}" for end in values) for dtype, values in ends.items())
        inside = sum(min(ends["float32"]) <= end <= max(ends["float32"]) for end in ends["bf16"])
        print(f"{what:28}{shown}; {inside} of {len(SEEDS)} in bf16 within those in float32")
    return {"runs": runs}


def _best(run: dict[str, Any]) -> float:
    return min(run["validation"].values())


def _last(run: dict[str, Any]) -> float:
    """Of the last hundred steps."""
    return fmean(run["losses"][-100:])


def _end(run: dict[str, Any]) -> float:
    return list(run["validation"].values())[-1]


def draw(what: str, found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    if what == "fsdp2":
        for (side, values), style in zip(found["drift"].items(), ("-", "--"), strict=True):
            label = {"cinemesh": "cinemesh, tp=2 cp=2", "rounded": "FSDP2 from weights one rounding away"}[side]
            axes.loglog(range(1, len(values) + 1), values, style, label=label)
        axes.set(xlabel="step", ylabel="largest relative difference of a loss so far")
        axes.set_title("float32: how far a run drifts from torch's own FSDP2")
    else:
        for name, run in found["runs"].items():
            colour = f"C{name[-1]}"  # of the seed
            style = "--" if name.startswith("bf16") else "-"
            axes.semilogy(
                [*map(int, run["validation"])], [*run["validation"].values()], style, color=colour, label=name
            )
        axes.set(xlabel="step", ylabel="validation loss", title="The quick start, three seeds and bf16")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fsdp2", "bf16"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = {"fsdp2": fsdp2, "bf16": bf16}[arguments.what](arguments)
    facts = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "steps": arguments.steps,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(facts | found) + "\n")
    if arguments.picture:
        draw(arguments.what, found, arguments.picture)


if __name__ == "__main__":
    main()
