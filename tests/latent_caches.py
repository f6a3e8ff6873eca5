"""Caches for tests: of clips whose frames are each of their own grey, in units of a few scenes."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from cinemesh.data.cache import building
from cinemesh.data.cache.building import CacheBuild
from cinemesh.data.cache.samples import Cache
from cinemesh.data.clips import write_mp4
from cinemesh.data.codec import BlockDCTCodec
from cinemesh.data.encoding import BlockDCT, Encoding
from cinemesh.data.settings import DataSettings
from cinemesh.data.text import ByteEncoder

CLIPS = 6
ENCODING = Encoding(BlockDCT(), BlockDCTCodec(), (ByteEncoder(4, 24, "letters"),))


def scenes_yaml(clips: int, extra: str = "") -> str:
    rows = [
        f"{{name: c{n}, file: {n}.mp4, first_frame: 0, last_frame: {15 + 4 * n}, caption: Grey {n}.{extra}}}"
        for n in range(clips)
    ]
    return f"[{', '.join(rows)}]"


def data_of(folder: Path, clips: int = CLIPS) -> DataSettings:
    """Clips of 16, 20, 24 ... frames, a scene each."""
    for n in range(clips):
        frames = (torch.arange(16 + 4 * n) * 3 + 20 * n).to(torch.uint8)[:, None, None, None].repeat(1, 16, 16, 3)
        write_mp4(folder / "clips" / f"{n}.mp4", frames, Fraction(15))
    (folder / "captions.yaml").write_text(scenes_yaml(clips))
    return DataSettings(
        (str(folder / "clips"),), folder / "captions.yaml", size=16, frames=8, fps=15, stride=2, validation_share=0.0
    )


def small_units(monkeypatch: pytest.MonkeyPatch, scenes: int = 2) -> None:
    monkeypatch.setattr(building, "UNIT_SCENES", scenes)


def built(settings: DataSettings, root: Path, after: str | None = None, **changes: object) -> Cache:
    build = CacheBuild.planned(replace(settings, **changes), ENCODING, root, after)
    return Cache.open(str(root), build.version() or build.work(progress=False))
