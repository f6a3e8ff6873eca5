"""Guidance as one batch of two, or over two groups of ranks, beside two captured runs: seconds of a guided velocity.

    python tests/benchmarks/guidance.py [--rounds 30] [--json results.json]

Two gloo processes make velocities of one clip in three ways by turns, all captured: both halves of the guidance in one
batch of two, each half on a rank of its own, and one half after the other, as two samplers do. The plan of each is the
one that ``plan --sample`` prices lowest, on this machine as ``cinemesh calibrate`` finds it. What is shown is a median
over rounds of ratios within a round, with a 95 % bootstrap interval: whatever slows this machine slows all three.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cinemesh.launch.cluster.processes import forked
from cinemesh.model.config import ModelConfig, preset
from cinemesh.model.inputs import BatchShape, condition_inputs
from cinemesh.model.runner import Batch
from cinemesh.model.sampler import GUIDANCE, Sampler
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import fill_shard, probe_values
from cinemesh.parallel.ir.layout import TOKENS
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.units import nested_index
from cinemesh.parallel.runtime.comm import sum_over_ranks
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.search.sampling import SampledClip, price_clips

MODEL = "tiny-video"
LATENTS = {"quick start": (2, 16, 16), "twice as long": (4, 16, 16), "larger": (4, 32, 32)}  # 128, 256, 1,024 tokens
RANKS = 2
WAYS = ("batch", "groups", "two runs")
RESAMPLES = 2000


def sampler(config: ModelConfig, plan: Plan, mesh: Mesh, latent: tuple[int, int, int], **how: Any) -> Sampler:
    """Captured, of one clip, with weights that are not zero."""
    units = unit_layout(config, plan)
    weights = torch.empty(1, units.flat_elements)
    fill_shard(weights, units, mesh.coordinates, probe_values(0))
    made = Sampler(config, plan, BatchShape(1, latent), mesh, weights, **how)
    assert made.capture("required") is None
    return made


def conditions(config: ModelConfig, latent: tuple[int, int, int]) -> Batch:
    """Of one clip: every key valid, text drawn once."""
    generator = torch.Generator().manual_seed(0)
    made: Batch = {}
    for spec in condition_inputs(config, Plan(dtype="float32"), BatchShape(1, latent)):
        whole = spec.dtype == "bool"
        made[spec.name] = (
            torch.ones(spec.shape, dtype=torch.bool) if whole else torch.randn(spec.shape, generator=generator)
        )
    return made


def measured(config: ModelConfig, latent: tuple[int, int, int], plans: dict[str, Plan], rounds: int) -> dict[str, Any]:
    """[rounds] wall seconds of the slower rank and CPU seconds of both, by way. On every rank."""
    torch.set_num_threads(1)
    meshes = {way: Mesh(plan) for way, plan in plans.items()}
    given = conditions(config, latent)

    def one(way: str, **how: Any) -> Callable[[], object]:
        made = sampler(config, plans[way], meshes[way], latent, **how)
        x, prepared = made.noise(0, torch.tensor([0]), latent, *_part(made)), made.given(given)
        return lambda: made.velocity_at(x, 0.5, prepared)

    batch, groups = one("batch", guidance=GUIDANCE), one("groups", guidance=GUIDANCE, apart=True)
    halves = [one("batch", guidance=guidance) for guidance in (1.0, 0.0)]
    runs: dict[str, Callable[[], object]] = {"batch": batch, "groups": groups}
    runs["two runs"] = lambda: [half() for half in halves]
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 2):
        order = WAYS[number % 3 :] + WAYS[: number % 3]
        for way in order:
            sum_over_ranks(torch.zeros(1))  # begin together
            begun, used = time.perf_counter(), time.process_time()
            runs[way]()
            spent = torch.tensor([time.perf_counter() - begun, time.process_time() - used], dtype=torch.float64)
            both = sum_over_ranks(spent)
            if number >= 2:
                wall[way].append(float(both[0]) / RANKS)
                cpu[way].append(float(both[1]))
    return {"wall_s": wall, "cpu_s": cpu}


def _part(made: Sampler) -> tuple[int, int]:
    """Which of how many parts of a clip's tokens this rank has."""
    return nested_index(made.plan, TOKENS, made.coordinates), made.plan.size(TOKENS)


def ratio(of: list[float], over: list[float]) -> dict[str, float]:
    """The median of ratios within a round, and its interval."""
    ratios = np.array(of) / np.array(over)
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (RESAMPLES, len(ratios))), 1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return {"median": round(float(np.median(ratios)), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def calibrated() -> PriceModels:
    """This machine's prices."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "here.yaml"
        command = [sys.executable, "-m", "cinemesh.launch", "calibrate", "--out", str(path), "--nproc", str(RANKS)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return PriceModels.of(load(str(path)))


def of_shape(config: ModelConfig, latent: tuple[int, int, int], models: PriceModels, rounds: int) -> dict[str, Any]:
    """What was priced of a shape, and what was measured."""
    priced: dict[str, SampledClip] = {}
    for clip in price_clips(config, latent, models, RANKS, "float32", 1):
        priced.setdefault(clip.guidance, clip)
    plans = {way: clip.plan for way, clip in priced.items()}
    found = forked(RANKS, lambda: measured(config, latent, plans, rounds))[0]
    chosen = min(priced, key=lambda way: priced[way].velocity_s)
    return {
        "latent": latent,
        "tokens": config.tokens(latent),
        "plans": {way: plan.equation() for way, plan in plans.items()},
        "predicted_velocity_s": {way: clip.velocity_s for way, clip in priced.items()},
        "priced_lower": chosen,
        "median_wall_s": {way: median(times) for way, times in found["wall_s"].items()},
        "wall_over_two_runs": {way: ratio(found["wall_s"][way], found["wall_s"]["two runs"]) for way in WAYS[:2]},
        "cpu_over_two_runs": {way: ratio(found["cpu_s"][way], found["cpu_s"]["two runs"]) for way in WAYS[:2]},
    }


def main() -> None:
    """Measure the shapes, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    config, models = preset(MODEL), calibrated()
    told = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU, gloo",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": MODEL,
        "rounds": asked.rounds,
        "shapes": {name: of_shape(config, latent, models, asked.rounds) for name, latent in LATENTS.items()},
    }
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
