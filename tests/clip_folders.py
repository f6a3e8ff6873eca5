"""Folders of clips and images for judging: small, moving, and of other pixels in every file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cinemesh.data.clips import write_mp4


def clip(path: Path, seed: int, *, size: tuple[int, int] = (32, 48), frames: int = 12, rate: int = 12) -> Path:
    """Height and width in ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    first = random.integers(0, 255, (1, *size, 3), dtype=np.uint8)
    write_mp4(path, torch.from_numpy(np.concatenate([np.roll(first, n, 2) for n in range(frames)])), Fraction(rate))
    return path


def image(path: Path, seed: int, size: tuple[int, int] = (32, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path


def bench(path: Path, names: list[str]) -> Path:
    """Prompts in a file."""
    path.write_text("".join(f"- {{name: {name}, prompt: A {name}., motion: low}}\n" for name in names))
    return path
