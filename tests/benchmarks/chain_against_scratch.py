"""The small chain of stages beside the same budget from scratch, and its average beside its members.

    python tests/benchmarks/chain.py [--seeds 0 1 2] [--ranks 2] [--work runs/chain-benchmark] [--json results.json]

For each seed the runs of ``configs/chain.yaml`` (images of 64 px, images and video of 64 px, then of 128 px, two
finetunings, their average, a clip), and one run more: the recipe of the stage of 128 px from random weights, for as
many steps as take the model FLOPs of all three stages. Both are validated on the same held-out windows. Stopped, it
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml

from cinemesh.launch.training.chain import Link, read_chain
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.greedy import measuring
from cinemesh.launch.training.members import read_members, read_shares
from cinemesh.launch.training.plateau import VALIDATIONS
from cinemesh.launch.training.setting import Setting
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.flops import model_flops

CHAIN = Path("configs/chain.yaml")
CLIP = "clip"  # what comes after it, the upsampler, is left out
LAST, SCRATCH = "t2iv-128", "scratch"  # the stage of 128 px; the run that begins with random weights
FINETUNED, MEAN = ("sft-a", "sft-b"), "mean"
KEPT = 100  # checkpoints a run: all, for those who compare earlier ones with later ones


def step_flops(link: Link) -> float:
    """Of a step, a mean over the buckets by weight."""
    setting = Setting.of(link.config())
    weights = [bucket.weight for bucket in setting.config.data.shapes]
    flops = [model_flops(build_step(setting.model, setting.config.plan, batch)) for batch in setting.batches]
    return sum(w * f for w, f in zip(weights, flops, strict=True)) / sum(weights)


def written(seed: int, work: Path, ranks: int) -> Path:
    """The chain of a seed, with the run from scratch in front of its finetunings. Caches are shared by the seeds."""
    chain = yaml.safe_load(CHAIN.read_text(encoding="utf-8"))
    folder = work / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    chain["stages"] = chain["stages"][: [stage["name"] for stage in chain["stages"]].index(CLIP) + 1]
    chain["directory"] = str(folder)
    chain["set"] |= {"plan.dp_shard": ranks, "logging.keep": KEPT}
    for stage in chain["stages"]:
        given = stage.setdefault("set", {})
        given["seed"] = seed + 100 * given.get("seed", 0)
        if "data.cache" in given:
            given["data.cache"] = str(work / "cache" / Path(given["data.cache"]).name)
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(chain), encoding="utf-8")
    links = {link.stage.name: link for link in read_chain(path)}
    stages = list(links)[: list(links).index(LAST) + 1]
    budget = sum(step_flops(links[name]) * links[name].config().schedule.steps for name in stages)
    last = next(stage for stage in chain["stages"] if stage["name"] == LAST)
    given = {key: value for key, value in last["set"].items() if not key.startswith("start_from.")}
    given["schedule.steps"] = round(budget / step_flops(links[LAST]))
    at = chain["stages"].index(last) + 1
    chain["stages"].insert(at, {"name": SCRATCH, "set": given})
    path.write_text(yaml.safe_dump(chain), encoding="utf-8")
    return path


def children_cpu_s() -> float:
    """CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of_seed(seed: int, work: Path, ranks: int) -> dict[str, Any]:
    """What a seed's runs end with; read again where they are done."""
    path = written(seed, work, ranks)
    told = path.with_name("ends.json")
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    begun, cpu = time.monotonic(), children_cpu_s()
    command = [sys.executable, "-m", "cinemesh.launch", "stages", str(path), "--nproc", str(ranks)]
    subprocess.run(command, check=True)
    links = {link.stage.name: link for link in read_chain(path)}
    ends: dict[str, Any] = {
        "seed": seed,
        "stages_wall_s": round(time.monotonic() - begun, 1),  # with the run from scratch; of the last start
        "stages_cpu_s": round(children_cpu_s() - cpu, 1),
    }
    before = 0.0
    for name in [*links][: [*links].index(LAST)]:
        before += step_flops(links[name]) * links[name].config().schedule.steps
    for name, spent in ((LAST, before), (SCRATCH, 0.0)):
        validated = read_manifest(links[name].end()).note[VALIDATIONS]
        step, loss, error = validated[-1]
        ends[name] = {"steps": step, "validation_loss": loss, "standard_error": error}
        each = step_flops(links[name])
        ends[name]["curve"] = [{"model_flops": spent + each * step, "loss": loss} for step, loss, _ in validated]
    members, _ = read_members([links[name].end() for name in FINETUNED])
    with measuring(links[MEAN].config(), members) as measured:
        for name, member in zip(FINETUNED, members, strict=True):
            held = measured.loss([member], [1.0])
            ends[name] = {"held_out_loss": held.loss, "standard_error": held.error}
        held = measured.loss(members, read_shares(None, len(members)))
        ends[MEAN] = {"held_out_loss": held.loss, "standard_error": held.error}
    ends["chain_below_scratch"] = ends[SCRATCH]["validation_loss"] - ends[LAST]["validation_loss"]
    best = min(ends[name]["held_out_loss"] for name in FINETUNED)
    ends["mean_below_best_member"] = best - ends[MEAN]["held_out_loss"]
    told.write_text(json.dumps(ends, indent=1), encoding="utf-8")
    print(told.read_text(encoding="utf-8"), flush=True)
    return ends


def draw(path: Path, seeds: list[dict[str, Any]]) -> None:
    """Validation loss over the model FLOPs that were spent so far."""
    from matplotlib.figure import Figure

    figure = Figure((8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, style, what in ((LAST, "-", "chain, its stage of 128 px"), (SCRATCH, "--", "from scratch")):
        for one in seeds:
            curve = one[name]["curve"]
            x, y = [at["model_flops"] / 1e12 for at in curve], [at["loss"] for at in curve]
            axes.plot(x, y, style, marker=".", color=f"C{one['seed']}", label=f"{what}, seed {one['seed']}")
    axes.set(xlabel="model TFLOPs, all stages so far", ylabel="validation loss at 128 px", yscale="log")
    axes.set_title("Three stages against training from scratch at equal compute")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the seeds, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2, help="processes of each run")
    parser.add_argument("--work", type=Path, default=Path("runs/chain-benchmark"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    seeds = [of_seed(seed, asked.work, asked.ranks) for seed in asked.seeds]
    told: dict[str, Any] = {"seeds": seeds}
    for key in ("chain_below_scratch", "mean_below_best_member"):
        values = [one[key] for one in seeds]
        told[key] = {
            "mean": fmean(values),
            "standard_error": stdev(values) / len(values) ** 0.5 if values[1:] else None,
        }
    told["origin"] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({key: value for key, value in told.items() if key != "seeds"}, indent=1))
    if asked.picture:
        draw(asked.picture, seeds)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
