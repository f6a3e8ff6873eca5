"""The autoencoder ablations of Movie Gen 3.6.3, small, on one CPU thread.

    ./run film
    python tests/benchmarks/tae_ablations.py [--work runs/tae-ablations] [--json a.json] [--picture a.png] [ARM ...]

Trains each of the arms below by its recipe in ``configs/tae``, from nothing, and measures it as ``codec eval
--frechet`` does: on the held-out windows of the quick start; and on the first 2, 4, 6 and 8 s of the shots in
``long_shots.yaml``, which are of a film that no arm saw, as ``--unseen`` does. The arms of a pair take the same number
of steps over the same clips, crops and noise. A run that was stopped goes on, and one that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinemesh.data.cache.decoding import decoded_windows
from cinemesh.data.encoding import codec_of
from cinemesh.evaluation.reconstruction import reconstruct
from cinemesh.files import atomic_file
from cinemesh.launch.commands.codec import QUICK_START, embedded
from cinemesh.launch.tae.loop import run as train
from cinemesh.launch.tae.recipe import read_tae_recipe
from cinemesh.launch.training.recipe import read_config
from cinemesh.model.tae.codec import TAECodec
from cinemesh.model.tae.work import decoder_work, encoder_work

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "tae"
ARMS = ("small", "frame-wise", "2.5d", "3d")  # two pairs, by their recipes
BESIDE = "dct-context"  # a linear codec, fitted, and measured with them
SHOTS = Path(__file__).parent / "long_shots.yaml"
FILM = ".venv/film"
SECONDS, FPS = (2, 4, 6, 8), 24
CLIP = 16, 64, 64  # whose FLOPs are told: a crop of training


def trained(arm: str, work: Path, overrides: Sequence[str]) -> Path:
    """The run of an arm, whole."""
    run = work / arm
    if not (run / "autoencoder" / "autoencoder.json").exists():
        given = [f"data.cache={work / 'cache'}", f"logging.directory={run}", *overrides]
        train(recipe=read_tae_recipe(RECIPES / f"{arm}.yaml", given), nproc=None)
    return run


def long_clips(size: int) -> list[tuple[str, Tensor]]:
    """The first 8 s of every long shot."""
    given = {"clips": f"[{FILM}]", "captions": SHOTS, "frames": SECONDS[-1] * FPS, "fps": FPS, "validation_share": 0,
             "stride": 10_000, "size": size}  # fmt: skip
    data = read_config(QUICK_START, [f"data.{name}={value}" for name, value in given.items()]).data
    return [(scene.name, frames) for scene, *_, frames in decoded_windows(data)]


def held_out(named: str, size: int) -> dict[str, Any]:
    words = "codec", "eval", "--codec", named, "--frechet", "--json", "--set", f"data.size={size}"
    done = subprocess.run([sys.executable, "-m", "cinemesh.launch", *words], check=True, text=True, stdout=-1)
    return {name: value for name, value in json.loads(done.stdout).items() if name not in ("codec", "latents")}


def by_length(named: str, clips: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Of the same shots, by how many of their first seconds are taken; networks in bfloat16, as they were trained."""
    codec, features = codec_of(named).build(), embedded()
    if isinstance(codec, TAECodec):
        codec = TAECodec.of(Path(named), "cpu", "bfloat16", named)
    found: dict[str, Any] = {}
    for seconds in SECONDS:
        of = reconstruct(codec, ((name, frames[: seconds * FPS]) for name, frames in clips), features)
        found[f"{seconds} s"] = asdict(of)
    return found


def measured(named: str, told: Path, clips: list[tuple[str, Tensor]], size: int) -> dict[str, Any]:
    """Both, kept in ``told``. ``clips`` are decoded when they are first needed."""
    if not told.exists():
        clips.extend([] if clips else long_clips(size))
        found = {"held_out": held_out(named, size), "by_length": by_length(named, clips)}
        with atomic_file(told) as part:
            part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return json.loads(told.read_text(encoding="utf-8"))


def training_db(squared: float) -> float:
    """PSNR of what the loss says of training crops, since the last report: their pixels are -1 to 1."""
    return 10 * math.log10(4 / squared)


def account_of(arm: str, run: Path) -> dict[str, Any]:
    """What it is, what it cost and how it went."""
    config = read_tae_recipe(RECIPES / f"{arm}.yaml").model.build()
    account = json.loads((run / "goodput.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    layers = {"encoding": encoder_work(config, *CLIP), "decoding": decoder_work(config, *CLIP)}
    held = "held_out/"
    return {
        "parameters": sum(layer.weights for half in layers.values() for layer in half),
        "gflop_a_clip": {name: sum(layer.flops for layer in half) / 1e9 for name, half in layers.items()},
        "latent_values_a_clip": config.channels * torch.Size(config.latent(*CLIP)).numel(),
        "steps": account["steps"],
        "wall_s": account["until"] - account["begun"],
        "of_it_in_steps_s": account["useful_s"],
        "training_psnr_db": [[row["step"], training_db(row["squared"])] for row in rows if "squared" in row],
        "curve": [
            {name.removeprefix(held): value for name, value in row.items() if name == "step" or name.startswith(held)}
            for row in rows
            if any(name.startswith(held) for name in row)
        ],
    }


def draw(path: Path, arms: dict[str, Any], beside: dict[str, Any]) -> None:
    """PSNR of training crops and of held-out windows over steps; of unseen shots over their length."""
    from matplotlib.figure import Figure

    figure = Figure((10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (arm, found) in enumerate(arms.items()):
        left.plot(*zip(*found["training_psnr_db"], strict=True), color=f"C{number}", alpha=0.3)
        held = [(row["step"], row["video_psnr_db"]) for row in found["curve"]]
        left.plot(*zip(*held, strict=True), marker=".", color=f"C{number}", label=arm)
    for number, found in enumerate((*arms.values(), beside)):
        values = [found["by_length"][f"{seconds} s"]["video_psnr_db"] for seconds in SECONDS]
        style = {"color": "grey", "linestyle": ":", "label": BESIDE} if found is beside else {"color": f"C{number}"}
        right.plot(SECONDS, values, marker=".", **style)
    left.axhline(beside["held_out"]["video_psnr_db"], color="grey", linestyle=":", label=BESIDE)
    left.set(xlabel="steps from nothing", ylabel="PSNR, dB: held out; pale: training", title="The quick start's scenes")
    right.set(xlabel="seconds of a clip", ylabel="PSNR, dB", title="Shots of a film that none of them saw")
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train and measure, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", default=ARMS, help=f"of {', '.join(ARMS)}; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe")
    parser.add_argument("--work", type=Path, default=Path("runs/tae-ablations"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # a run takes as many threads as it has cores
    torch.set_num_threads(1)
    arms, clips = dict[str, Any](), list[tuple[str, Tensor]]()
    size = read_tae_recipe(RECIPES / f"{ARMS[0]}.yaml", asked.set).data.size
    for arm in asked.arms:
        run = trained(arm, asked.work, asked.set)
        arms[arm] = account_of(arm, run) | measured(str(run / "autoencoder"), run / "measured.json", clips, size)
    beside = measured(BESIDE, asked.work / f"{BESIDE}.json", clips, size)
    told: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work, no GPU; one thread",
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        "command": "python tests/benchmarks/tae_ablations.py",
        "set": asked.set,
        "not_of_the_paper": "size, clips, steps, losses (no adversary, no features), no image autoencoder before",
        "gflop_and_latent_values_are_of": f"a clip of {'x'.join(map(str, CLIP))}",
        "frechet": "of EfficientNet-lite0's features of all frames: no FID, no FVD",
        "arms": arms,
        BESIDE: beside,
    }
    for arm, found in arms.items():
        ends = {seconds: round(of["video_psnr_db"], 2) for seconds, of in found["by_length"].items()}
        print(arm, f"{found['steps']} steps", f"{found['held_out']['video_psnr_db']:.2f} dB", ends)
    if asked.picture:
        draw(asked.picture, arms, beside)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
