"""What the outlier penalty does: ``python tests/benchmarks/tae_outliers.py WITH WITHOUT CACHE [RESULT]``.

Two finished runs of configs/tae/outliers.yaml, with the penalty and with ``losses.outlier=0``, and the cache of their
pixels. Measures the largest norm of a latent on every second held-out window, in standard deviations of its frame as
the penalty counts them, and the share of positions that it punishes; writes them with the runs' own reconstruction, and
what both began as, to RESULT, by default ``results/tae_outliers.json``.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cinemesh.data.cache.samples import Cache
from cinemesh.data.cache.version import version_names
from cinemesh.data.encoding import codec_of
from cinemesh.launch.tae.trained import clips_of
from cinemesh.model.tae.losses import OUTLIER_R, outlier_penalty

RESULT = Path(__file__).parent / "results" / "tae_outliers.json"


def about(autoencoder: Path) -> dict[str, Any]:
    return json.loads((autoencoder / "autoencoder.json").read_text(encoding="utf-8"))["about"]


def measured(autoencoder: Path, cache: Cache) -> dict[str, Any]:
    codec, told = codec_of(str(autoencoder)).build(), about(autoencoder)
    norms, penalties = [], []
    for _, frames in list(clips_of(cache.buckets[0].validation))[::2]:
        latent = codec.encode(frames).transpose(0, 1)
        away = (latent - latent.mean((2, 3), keepdim=True)).square().sum(1).sqrt()
        norms.append((away / latent.var((2, 3), correction=0).sum(1).sqrt()[:, None, None]).flatten())
        penalties.append(outlier_penalty(latent))
    return {
        "steps": told["steps"],
        "weight": told["recipe"]["losses"]["outlier"],
        "largest_norm_std": torch.cat(norms).max().item(),
        "share_beyond": (torch.cat(norms) > OUTLIER_R).double().mean().item(),
        "penalty": torch.cat(penalties).mean().item(),
        "held_out": told["held_out"],
    }


def main() -> None:
    runs = {name: Path(run) / "autoencoder" for name, run in zip(("with", "without"), sys.argv[1:3], strict=True)}
    cache = Cache.open(sys.argv[3], version_names(Path(sys.argv[3]))[-1])
    recipe = about(runs["with"])["recipe"]
    found = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()}-core x86-64, no GPU, busy; one thread",
        "versions": {"torch": version("torch")},
        "command": "python tests/benchmarks/tae_outliers.py WITH WITHOUT CACHE [RESULT]",
        "recipe": {name: recipe[name] for name in ("model", "losses", "optimizer", "schedule")},
        "begun_as": measured(Path(recipe["start_from"]), cache),
        **{name: measured(run, cache) for name, run in runs.items()},
    }
    result = Path(sys.argv[4]) if sys.argv[4:] else RESULT
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
