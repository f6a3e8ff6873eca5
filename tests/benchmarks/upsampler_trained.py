"""A small upsampler against bilinear, on held-out shots: ``python tests/benchmarks/upsampler_trained.py [RUN]``.

Trains configs/upsampler.yaml, or takes a run of it, finished or not, and writes to ``results/upsampler_trained.json``,
``.png``: the PSNR of held-out windows by steps of the sampler, beside that of the small clip enlarged bilinearly and of
the codec alone; and what a long clip changes at the borders of windows over what it changes within, blended or not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cinemesh.data.cache.decoding import decoded_windows
from cinemesh.data.clips import write_contact_sheet
from cinemesh.data.low_resolution import enlarged
from cinemesh.evaluation.reconstruction import psnr
from cinemesh.kernels.dtypes import TORCH_DTYPES
from cinemesh.launch import train
from cinemesh.launch.exchange.exporting import found_checkpoint
from cinemesh.launch.training.checkpoint.loading import load_weights
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.noted import noted_recipe
from cinemesh.launch.training.setting import Setting
from cinemesh.model.inputs import BatchShape
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import equal_steps
from cinemesh.model.step import unit_layout
from cinemesh.model.windowed import WindowedSampler
from cinemesh.model.windows import OVERLAP, WINDOW, OverlappingWindows
from cinemesh.parallel.runtime.mesh import coordinates

RESULT = Path(__file__).parent / "results" / "upsampler_trained.json"
RECIPE = Path(__file__).parents[2] / "configs" / "upsampler.yaml"
STEPS = (1, 4, 20)
LONG = 42  # frames: three windows of 14, or four that overlap by 4
SHOWN = 4  # clips in the picture


class Upsampler:
    """A checkpoint, and small clips made of large ones as in training."""

    def __init__(self, run: Path) -> None:
        path = found_checkpoint(str(run))
        self.found = read_manifest(path)
        config = noted_recipe(path, self.found, {})
        self.setting = Setting.of(config)
        plan = config.plan
        units = unit_layout(self.setting.model, plan)
        weights = torch.empty(1, units.flat_elements, dtype=TORCH_DTYPES[plan.stat_dtype])
        load_weights(path, config.weights, weights, units, coordinates(plan, 0))
        latent = config.data.shapes[0].latent(self.setting.encoding.codec)
        self.sampler = Sampler(self.setting.model, plan, BatchShape(1, latent), None, weights, guidance=0.0)
        self.text = self.setting.encoding.captions([""])

    def small(self, frames: Tensor, clip: str, first: int) -> Tensor:
        """Enlarged bilinearly: uint8 of the frames' own size."""
        makes = self.setting.encoding.low_resolution
        assert makes is not None
        return enlarged(makes.small(frames, clip, first), frames.shape[1], frames.shape[2])

    def made(self, shown: Tensor, steps: int, overlap: int = OVERLAP) -> Tensor:
        codec, small = self.setting.encoding.codec, self.setting.encoding.low_resolution
        assert small is not None
        windows, name = OverlappingWindows(len(shown), WINDOW, overlap), small.condition(codec).input
        latent = codec.encode(shown)[None]

        def conditions(number: int) -> dict[str, Tensor]:
            start = windows.starts[number]
            return self.text | {name: latent[:, :, start : start + WINDOW]}

        windowed = WindowedSampler(self.sampler, windows)
        return codec.decode(windowed.sample(conditions, 0, torch.tensor([0]), equal_steps(steps)))


def seam_ratio(clip: Tensor, starts: Sequence[int]) -> float:
    """The change from frame to frame where a window begins or ends, over that elsewhere: of its error's, see below."""
    change = (clip[1:].float() - clip[:-1].float()).abs().mean((1, 2, 3))
    borders = {start - 1 for start in starts[1:]} | {start + WINDOW - 1 for start in starts[:-1]}
    inside = [value.item() for at, value in enumerate(change) if at not in borders]
    return fmean(change[at].item() for at in borders) / fmean(inside)


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/upsampler")
    if len(sys.argv) == 1:
        train.run(config=RECIPE, nproc=2, overrides=[])
    upsampler = Upsampler(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held: dict[str, list[tuple[int, Tensor]]] = {}
    data = upsampler.setting.config.data
    windows = [(s.name, first, frames) for s, _, val, first, frames in decoded_windows(data, progress=False) if val]
    for name, first, frames in windows:
        held.setdefault(name, []).append((first, frames))
    scores: dict[str, list[float]] = {}
    pictures: dict[str, Tensor] = {}
    codec = upsampler.setting.encoding.codec
    for name, of_scene in held.items():
        first, frames = of_scene[0]
        shown = upsampler.small(frames, name, first)
        clips = {"bilinear": shown, "codec alone": codec.decode(codec.encode(frames))}
        clips |= {f"{steps} steps": upsampler.made(shown, steps) for steps in STEPS}
        for what, clip in clips.items():
            scores.setdefault(what, []).append(psnr(clip, frames))
        if len(pictures) < 4 * SHOWN:
            few = {f"{name}: {what}": clips[what] for what in ("bilinear", "1 steps", f"{STEPS[-1]} steps")}
            pictures |= few | {f"{name}: film": frames}
    seams = long_clip(upsampler)
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()}-core x86-64, no GPU, shared with other work; two processes",
        "versions": {"torch": version("torch")},
        "command": "python tests/benchmarks/upsampler_trained.py",
        "steps_trained": upsampler.found.step,
        "step_s": [row["step_s"] for row in rows if "step_s" in row][-1:],
        "loss": [[row["step"], row["loss"]] for row in rows if "loss" in row and row["step"] <= upsampler.found.step],
        "held_out_windows": len(held),
        "psnr_db": {what: round(fmean(values), 3) for what, values in scores.items()},
        "psnr_db_by_scene": {what: [round(value, 2) for value in values] for what, values in scores.items()},
        "seam_ratio": seams,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    told = ", ".join(f"{what} {value:.2f}" for what, value in found["psnr_db"].items())
    write_contact_sheet(RESULT.with_suffix(".png"), pictures, f"Mean PSNR of held-out windows, dB: {told}")
    print(json.dumps(found["psnr_db"]), json.dumps(seams))


def long_clip(upsampler: Upsampler) -> dict[str, float]:
    """Of the longest shot's first frames, whose windows overlap by 4 and by nothing; and of the film itself."""
    section = upsampler.setting.config.data
    pieces = [(s.name, first, frames) for s, _, _, first, frames in decoded_windows(section, progress=False)]
    longest = max({name for name, _, _ in pieces}, key=lambda name: sum(name == other for other, _, _ in pieces))
    frames: list[Tensor] = []
    begun = 0
    for name, _, window in pieces:  # windows begin every ``stride`` frames
        if name == longest and begun % WINDOW == 0:
            frames.append(window)
        begun += section.stride if name == longest else 0
    whole = torch.cat(frames)[:LONG]
    shown = upsampler.small(whole, longest, 0)
    found: dict[str, float] = {}
    for what, overlap in (("blended", OVERLAP), ("not blended", 0)):
        starts = OverlappingWindows(len(whole), WINDOW, overlap).starts
        assert all(b > a for a, b in pairwise(starts))
        clip = upsampler.made(shown, STEPS[-1], overlap)
        found[what] = round(seam_ratio(clip, starts), 3)
        found[f"film, as {what}"] = round(seam_ratio(whole, starts), 3)
    return found


if __name__ == "__main__":
    main()
