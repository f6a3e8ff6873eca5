"""The ablations of Movie Gen 3.6.2 on a small twin of the 5B, on one core: which model says better what a clip was.

    python tests/benchmarks/ablations.py [--seeds 0 1 2] [--work runs/ablations] [--json results.json] [--picture a.png]

Every arm is the twin of its recipes in ``configs/ablation/``: what these change of the baseline's is read from them
(objective, block, FFN by 3/2, captions), images first, then images and video at 0.02 steps to 1. The twin is the quick
start's model (4 blocks of width 192) on its seven scenes, 64 px and 16 frames. Losses of the two objectives are of
different targets, so all arms are asked one thing: of the same noised held-out clip, at the same ratio of signal to
noise, which clip was it? The error is the mean square of the difference in latents. It is asked with the video's
captions, and with those that the arm was trained on.

A run that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import plain_states
from noise_levels import at_level, data_of

from cinemesh.data.cache.samples import Sample, collate
from cinemesh.launch.cluster.processes import joined
from cinemesh.launch.commands.stages import run as run_chain
from cinemesh.launch.training.chain import Link, read_chain
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.setting import Setting
from cinemesh.model.inputs import LATENTS
from cinemesh.model.paths import DIFFUSION
from cinemesh.model.reference import Reference

RECIPES = Path("configs/ablation")
ARMS = {  # the recipes of its two stages
    "baseline": ("1-flow", "2-flow"),
    "v-prediction": ("1-v-prediction", "2-v-prediction"),
    "DiT block": ("1-dit", "2-dit"),
    "image captions": ("1-flow", "2-image-captions"),
}
BASELINE = "baseline"
PAPER_FFN, TWIN_FFN = 8192, 512
SIDE, FRAMES = 64, 16  # pixels; 2 latent frames of 4x4 patches: 32 tokens
IMAGE_STEPS, VIDEO_STEPS = 80, 160
COMMON: dict[str, Any] = {
    "plan.dp_shard": 1,
    "sample": None,
    "data.size": SIDE,
    "logging.every": 50,
    "logging.validate_every": 0,
    "logging.checkpoint_every": 0,
    "schedule.warmup_steps": 20,
    "schedule.decay": "constant",  # as in the recipes
    "optimizer.ema_decay": 0.98,
    "optimizer.weight_decay": 1.0,
    "codec": {"kind": "block-dct"},
}
IMAGES = {"model.position_lengths": [1, 4, 4], "data.frames": 1, "data.stride": 4, "data.global_batch": 16}
VIDEO = {
    "model.position_lengths": [2, 4, 4],
    "start_from.positions": "expand",
    "data.frames": FRAMES,
    "data.buckets": [{"weight": 1}, {"frames": 1, "weight": 0.02, "global_batch": 16}],
    "optimizer.lr": 4.0e-3,  # half of the images'; the paper's is a sixth, after 96 thousand steps
}
LEVELS = tuple(range(50, 1000, 100))  # steps of noise of 1,000, which every objective is asked at
DRAWS = 2  # of noise, of each window


def changed(recipe: str) -> dict[str, Any]:
    """What a recipe changes of the baseline's, as keys of the twin's."""
    values = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    model, found = values["model"], dict[str, Any]()
    for key in ("objective", "block"):
        if key in model:
            found[f"model.{key}"] = model[key]
    if "ffn" in model:
        found["model.ffn"] = TWIN_FFN * model["ffn"] // PAPER_FFN
    if "captions" in values["data"]:
        found["data.captions"] = values["data"]["captions"]
    return found


def written(seed: int, work: Path) -> Path:
    """The chain of a seed's runs. Caches are shared by seeds, and by arms of the same captions."""
    folder = work / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    stages = dict[str, dict[str, Any]]()
    for first, second in ARMS.values():
        for name, after, kind, steps in ((first, None, IMAGES, IMAGE_STEPS), (second, first, VIDEO, VIDEO_STEPS)):
            own = changed(name)
            captions = Path(own.get("data.captions", "video")).stem
            cache = {"data.cache": str(work / "cache" / f"{name[0]}-{captions}"), "schedule.steps": steps}
            before = {} if after is None else {"after": after}
            stages[name] = {"name": name, **before, "set": kind | own | cache}
    path = folder / "chain.yaml"
    chain = {
        "directory": str(folder),
        "recipe": "configs/quickstart.yaml",
        "set": COMMON | {"seed": seed},
        "stages": sorted(stages.values(), key=lambda stage: stage["name"]),
    }
    path.write_text(yaml.safe_dump(chain), encoding="utf-8")
    return path


def held_out(link: Link) -> list[Sample]:
    """Its held-out clips, by scene and frame: the same for every arm but for their captions."""
    setting = Setting.of(link.config())
    with joined(setting.config.plan, "cpu") as place:
        cache = open_history(setting, place).at(setting.config.schedule.steps)
    windows = next(bucket for bucket in cache.buckets if bucket.bucket == f"{FRAMES}x{SIDE}x{SIDE}")
    samples = [windows.validation[index] for index in range(len(windows.validation))]
    return sorted(samples, key=lambda sample: (sample.scene, sample.first_frame))


def errors(link: Link, samples: list[Sample]) -> list[float]:
    """The error of the estimated clip at each of ``LEVELS``, over windows and draws: of the run's averaged weights."""
    setting = Setting.of(link.config())
    model = Reference(setting.model)
    model.load_state_dict(plain_states(Path(str(link.end())))["ema"])
    batch = collate(samples, 0, 1)
    x1, generator = batch[LATENTS], torch.Generator().manual_seed(0)
    drawn = [torch.randn(x1.shape, generator=generator) for _ in range(DRAWS)]
    found: list[float] = []
    for level in LEVELS:
        signal = DIFFUSION.signal[level].item()
        t, scale = at_level(setting.model.objective, signal)
        squares: list[float] = []
        for noise in drawn:
            x_t = (signal * x1 + (1 - signal**2) ** 0.5 * noise) / scale
            times = torch.full((len(x1),), t)
            squares.append(_square(model, x_t, times, batch, x1))
        found.append(fmean(squares))
    return found


@torch.no_grad()
def _square(model: Reference, x_t: Tensor, t: Tensor, batch: dict[str, Tensor], x1: Tensor) -> float:
    """Mean square of the estimate's error."""
    return (data_of(model.config.objective, x_t, model(x_t, t, batch), t) - x1).square().mean().item()


def of_seed(seed: int, work: Path) -> dict[str, Any]:
    """What a seed's runs end with; read again where they are done."""
    path = written(seed, work)
    told = path.with_name("ends.json")
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    used = time.process_time()
    run_chain(path=path, nproc=None)
    links = {link.stage.name: link for link in read_chain(path)}
    shown = held_out(links[ARMS[BASELINE][1]])
    ends: dict[str, Any] = {"seed": seed, "windows": len(shown), "arms": {}}
    for arm, (_, last) in ARMS.items():
        own = held_out(links[last])
        assert all(torch.equal(a.latent, b.latent) for a, b in zip(shown, own, strict=True))
        each = {"of video captions": errors(links[last], shown), "of its own captions": errors(links[last], own)}
        ends["arms"][arm] = {what: {"mean": fmean(found), "by level": found} for what, found in each.items()}
    ends["cpu_s"] = round(time.process_time() - used, 1)  # of the last start
    told.write_text(json.dumps(ends, indent=1), encoding="utf-8")
    return ends


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": round(fmean(values), 4),
        "standard_deviation": round(stdev(values), 4) if values[1:] else None,
        "by_seed": [round(value, 4) for value in values],
    }


def table(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every arm and kind of captions: the error, and how far below it the baseline is, seed by seed."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        found[arm] = {}
        for what in ("of video captions", "of its own captions"):
            means = [one["arms"][arm][what]["mean"] for one in seeds]
            base = [one["arms"][BASELINE][what]["mean"] for one in seeds]
            levels = [one["arms"][arm][what]["by level"] for one in seeds]
            found[arm][what] = {
                "error": spread(means),
                "above_the_baseline": spread([a - b for a, b in zip(means, base, strict=True)]),
                "by_level": [round(fmean(level), 4) for level in zip(*levels, strict=True)],
            }
    return found


def draw(path: Path, arms: dict[str, Any], signal: list[float]) -> None:
    """The error over the level of noise, of every arm."""
    from matplotlib.figure import Figure

    figure = Figure((7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    base = arms[BASELINE]["of video captions"]["by_level"]
    ratio = [10 * math.log10(s**2 / (1 - s**2)) for s in signal]
    for number, (arm, found) in enumerate(arms.items()):
        for what, style in (("of video captions", "-"), ("of its own captions", ":")):
            if what == "of video captions" or arm == "image captions":
                values = [a / b for a, b in zip(found[what]["by_level"], base, strict=True)]
                label = arm if what == "of video captions" else f"{arm}, asked with its own"
                axes.plot(ratio, values, style, marker=".", color=f"C{number}", label=label)
    axes.set(xlabel="signal to noise, dB", ylabel="error of the clip, over the baseline's")
    axes.set_title("What a small twin says of noised held-out clips, mean of the seeds")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the seeds, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # a run takes as many threads as it has cores
    seeds = [of_seed(seed, asked.work) for seed in asked.seeds]
    signal = [DIFFUSION.signal[level].item() for level in LEVELS]
    path = written(asked.seeds[0], asked.work)
    config = {link.stage.name: link for link in read_chain(path)}[ARMS[BASELINE][1]].config()
    arms = table(seeds)
    told: dict[str, Any] = {
        "twin": {
            "model": config.model.preset,
            "clips": f"{FRAMES} frames of {SIDE} px, 32 tokens; {seeds[0]['windows']} held-out windows",
            "steps": {"images": IMAGE_STEPS, "images and video": VIDEO_STEPS},
            "not_of_the_paper": "size, data, steps, batch, learning rates; nobody judged a clip",
        },
        "levels_of_noise": list(LEVELS),
        "signal": [round(s, 4) for s in signal],
        "arms": arms,
        "seeds": seeds,
        "origin": {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, one of {os.cpu_count()} cores, shared with other work",
            "cpu_s": round(sum(one["cpu_s"] for one in seeds), 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps({key: value for key, value in told.items() if key != "seeds"}, indent=1))
    if asked.picture:
        draw(asked.picture, arms, signal)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
