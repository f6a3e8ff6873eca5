"""50 linear-quadratic steps beside 250, 500 and 1,000 linear ones, and other solvers, on a trained model.

    cinemesh stages configs/chain.yaml --nproc 2
    python tests/benchmarks/sampling_schedules.py runs/chain/mean/average [--json results.json]

One scene of the quick start is sampled from its caption and one seed by each schedule and solver. PSNR is of
decoded clips to those of 1,000 linear Euler steps; time is CPU seconds of this process, on one thread, since others may
use the machine. One number is what two unlike clips have in common: the PSNR of a scene's clip to that of another seed.

The schedule's own numbers are compared with what can be read in the paper (3.4.2), which gives words and a figure: its
first 25 steps are those of 250 linear ones, exactly; and with three public readings of the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cinemesh.data.scenes import read_captions
from cinemesh.evaluation.reconstruction import psnr
from cinemesh.launch.cluster.processes import joined
from cinemesh.launch.progress import progress
from cinemesh.launch.training.checkpoint.loading import load_weights
from cinemesh.launch.training.clip_sampler import ClipSampler
from cinemesh.launch.training.recipe import SampleSection, read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.solvers import SOLVERS, linear_quadratic
from cinemesh.model.step import unit_layout
from cinemesh.parallel.runtime.mesh import coordinates

RECIPE = Path("configs/quickstart.yaml")
LENGTHS = (2, 8, 8)  # position tables of the chain's last stages
SCENES = 1
REFERENCE = SampleSection(steps=1000, schedule="linear", guidance=1.5)
ROWS = (
    REFERENCE,
    *(replace(REFERENCE, steps=steps) for steps in (500, 250, 50)),
    *(replace(REFERENCE, steps=steps, schedule="linear-quadratic") for steps in (50, 25)),
    replace(REFERENCE, steps=25, schedule="linear-quadratic", solver="midpoint"),  # as many velocities as 50 of Euler
    replace(REFERENCE, steps=8, schedule="linear-quadratic", solver="dopri5"),  # 48 velocities
)


def readings(steps: int = 50, emulated: int = 250) -> dict[str, list[float]]:
    """Three public readings of the schedule, written out apart from this project's."""
    half = steps // 2
    tau = half / emulated
    bend, rest = half - tau * steps, steps - half
    a, b = bend / (half * rest**2), tau / half - 2 * bend / rest**2
    mochi = [i * tau / half if i < half else a * i * i + b * i + a * half**2 for i in range(steps + 1)]
    first = [i / emulated for i in range(half)]
    motif = [*first, *(1 - (1 - steps / (2 * emulated)) * (1 - (i / rest) ** 2) for i in range(rest + 1))]
    mindone = [
        *first,
        *((half - 1 + (emulated - half + 1) * (k / (half + 1)) ** 2) / emulated for k in range(1, half + 2)),
    ]
    return {"Mochi, diffusers, ComfyUI": mochi, "Motif": motif, "mindone": mindone}


def schedule_compared() -> dict[str, Any]:
    """Ours beside the paper's words and the readings."""
    ours = linear_quadratic(50)
    assert len(ours) == 51
    return {
        "linear_steps_equal_to_those_of_250": sum(abs(t - i / 250) < 1e-15 for i, t in enumerate(ours)) - 1,
        "largest_difference": {
            name: max(abs(a - b) for a, b in zip(ours, times, strict=True)) for name, times in readings().items()
        },
        "t": {i: round(ours[i], 4) for i in (24, 25, 26, 27, 30, 40, 45, 49, 50)},
    }


def clips(
    setting: Setting, section: SampleSection, checkpoint: Path, prompts: dict[int, str]
) -> tuple[list[Tensor], float]:
    """Decoded clips of all prompts, and CPU seconds of sampling alone."""
    setting = replace(setting, config=replace(setting.config, sample=section))
    plan = setting.config.plan
    with joined(plan, "cpu") as place:
        units = unit_layout(setting.model, plan)
        weights = torch.empty(1, units.flat_elements)
        load_weights(checkpoint, setting.config.weights, weights, units, coordinates(plan, 0))
        sampler = ClipSampler(setting, place, weights, prompts, samples=len(prompts))
        begun = time.process_time()
        latents = [latent for _, latent in sampler.latents(silent=True)]
        taken = time.process_time() - begun
    return [setting.encoding.codec.decode(latent) for latent in latents], taken


def main() -> None:
    """Sample the rows, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of the chain: an average, or a step-* folder at 128 px")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    recipe = read_config(RECIPE, [f"model.position_lengths={[*LENGTHS]}", "plan.dp_shard=1"])
    setting = Setting.of(recipe)
    prompts = dict(enumerate(f"FPS-25 {scene.caption}" for scene in read_captions(recipe.data.captions)[:SCENES]))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    reference: list[Tensor] = []
    reference_s = 0.0
    with progress("sampling", len(ROWS) + 1) as begin:
        for section in ROWS:
            begin(f"{section.steps} {section.schedule} steps, {section.solver}")
            made, taken = clips(setting, section, asked.checkpoint, prompts)
            if section is REFERENCE:
                reference, reference_s = made, taken
            db = [psnr(clip, other) for clip, other in zip(made, reference, strict=True)]
            same = section is REFERENCE
            rows.append({
                "schedule": section.schedule,
                "steps": section.steps,
                "solver": section.solver,
                "velocities": section.steps * len(SOLVERS[section.solver].nodes),
                "psnr_db": None if same else {"mean": round(fmean(db), 2), "least": round(min(db), 2)},
                "cpu_s": round(taken, 2),
                "times_faster_than_1000": round(reference_s / taken, 2),
            })  # fmt: skip
        begin("another seed")
        other, _ = clips(
            setting, replace(REFERENCE, steps=50, schedule="linear-quadratic", seed=1), asked.checkpoint, prompts
        )
    unlike = [psnr(clip, of) for clip, of in zip(other, reference, strict=True)]
    told = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, no GPU",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": f"{setting.model.name}, {setting.config.weights} weights, {len(prompts)} scenes, guidance 1.5",
        "another_seed_psnr_db": {"mean": round(fmean(unlike), 2), "most": round(max(unlike), 2)},
        "rows": rows,
        "schedule": schedule_compared(),
    }
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
