"""Builds of a cache by several processes that are killed at any moment, and what they leave."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from latent_caches import ENCODING, scenes_yaml

from cinemesh.data.cache import building
from cinemesh.data.cache.building import CacheBuild
from cinemesh.data.settings import DataSettings

RANKS = 4
UNIT_SCENES = 2


@dataclass(frozen=True)
class Left:
    """By a build that was killed after ``after_s``: whole units, and those that were begun and are lost."""

    after_s: float
    whole: int
    lost: int
    kept: bool  # whether every whole unit was there, untouched, when all was done
    version: str


def many_clips(folder: Path, settings: DataSettings, clips: int) -> DataSettings:
    """A scene for each of many names of the six files, so that there are many units."""
    rows = scenes_yaml(6).removeprefix("[").removesuffix("]").split("}, ")
    scenes: list[str] = []
    for n in range(clips):
        row = rows[n % 6].rstrip("}").replace(f"name: c{n % 6}", f"name: d{n}").replace(f"{n % 6}.mp4", f"{n}.mp4")
        link = folder / "clips" / f"{n}.mp4"
        if not link.exists():
            os.link(folder / "clips" / f"{n % 6}.mp4", link)
        scenes.append(row + "}")
    settings.captions.write_text(f"[{', '.join(scenes)}]")
    return settings


def start(settings: DataSettings, root: Path) -> list[int]:
    """Processes that build together."""
    found: list[int] = []
    for _ in range(RANKS):
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.set_num_threads(1)
                building.UNIT_SCENES = UNIT_SCENES
                build = CacheBuild.planned(settings, ENCODING, root)
                if build.version() is None:
                    build.work(progress=False)
                code = 0
            finally:
                os._exit(code)
        found.append(child)
    return found


def whole_units(root: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for folder in ("latents", "captions")
        for path in (root / folder).glob("[0-9a-f]*/rows.parquet")
    }


def killed_at(settings: DataSettings, root: Path, after_s: float) -> Left:
    """CacheBuild with RANKS processes, kill all after so long, look, and go on to the end with as many."""
    children = start(settings, root)
    time.sleep(after_s)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    whole, lost = whole_units(root), len(list(root.glob("*/.*.part")))
    codes = [os.waitpid(child, 0)[1] for child in start(settings, root)]
    assert codes == [0] * RANKS, codes
    after = whole_units(root)
    building.UNIT_SCENES = UNIT_SCENES
    version = CacheBuild.planned(settings, ENCODING, root).version()
    assert version is not None and not list(root.glob("latents/.*.part"))
    return Left(after_s, len(whole), lost, all(after[path] == whole[path] for path in whole), version)
