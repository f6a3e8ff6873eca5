"""Neighbours of seeds: which clips stay, what seeds are refused, and the preset for fine-tuning that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from planted_clips import curate, scene, write

from cinemesh.data.curate.neighbours import TAXONOMY, Neighbours, read_seeds
from cinemesh.errors import CinemeshError


def turned(degrees: float) -> Any:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], np.float32)


def of_seeds(folder: Path, seeds: object, k: int = 2, texts: Callable[[Sequence[str]], Any] | None = None) -> list[str]:
    """Which of six clips, 0 to 75 degrees, stay."""
    (folder / "seeds.yaml").write_text(yaml.safe_dump(seeds))
    vectors = {f"c{n}": turned(15 * n) for n in range(6)}
    rows = [{"id": each} for each in vectors]
    rule = Neighbours(str(folder / "seeds.yaml"), k)
    dropped = rule.dropped(rows, vectors, texts or (lambda asked: np.stack([turned(float(each)) for each in asked])))
    return [each for each in vectors if each not in dropped]


def test_each_seed_keeps_its_nearest(tmp_path: Path) -> None:
    """Of texts and of clips; a clip that two seeds want counts for both: no seed gives its place to another."""
    assert of_seeds(tmp_path, [{"clip": "c4"}], 3) == ["c3", "c4", "c5"]
    assert of_seeds(tmp_path, ["2"]) == ["c0", "c1"]
    assert of_seeds(tmp_path, ["2", {"clip": "c0"}, "74"]) == ["c0", "c1", "c4", "c5"]
    assert of_seeds(tmp_path, ["30"], 100) == ["c0", "c1", "c2", "c3", "c4", "c5"]


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ([], "is no list of seeds"),
        ({"clip": "c0"}, "is no list of seeds"),
        (["a dog", 7], "seed 2 is 7"),
        ([{"id": "c0"}], "seed 1 is"),
        ([{"clip": "c9"}], "clip 'c9' is not among the 6 that are left"),
    ],
)
def test_seeds_that_are_none_are_refused(seeds: object, told: str, tmp_path: Path) -> None:
    """A clip that an earlier stage dropped was taken for a text, in silence."""
    with pytest.raises(CinemeshError, match=told):
        of_seeds(tmp_path, seeds)


def test_the_taxonomy_that_ships_is_texts_alone() -> None:
    clips, texts = read_seeds(TAXONOMY)
    assert not clips and len(texts) == len(set(texts)) > 40


def test_the_set_for_fine_tuning_takes_neighbours_of_the_taxonomy(clip: Path, tmp_path: Path) -> None:
    """The preset sft, but for weights that do not ship and what small clips cannot have: one clip of each text stays.

    Texts of ids alone would keep all four; a CLIP of random weights finds one clip nearest for most texts.
    """
    (tmp_path / "raw").mkdir()
    for name in ("taxi", "cyclist", "fence", "bollard"):
        write(tmp_path / "raw" / f"{name}.mp4", scene(name))
    off: dict[str, Any] = {"scores": {"aesthetic": None, "subject": None}, "copies": None, "humans": None}
    off |= dict.fromkeys(("duration", "size", "jitter", "motion", "text", "borders", "resample", "static", "slides"))
    given = {
        "preset": "sft",
        "sources": [str(tmp_path / "raw")],
        "measure": {"copies": {"kind": "efficientnet"}, "joint": {"kind": "clip", "path": str(clip)}},
        "cut": {"least_s": 0.5, "start_s": None},
        "videos": off | {"neighbours": {"k": 1}},
        "images": off,
    }
    outcome = curate(given, tmp_path / "out")
    dropped = {Path(row["file"]).stem: row["dropped_by"] for row in outcome.rows}
    assert set(dropped.values()) == {None, "neighbours"} and 0 < len(outcome.kept) < 4
    why = next(row["why"] for row in outcome.rows if row["dropped_by"])
    assert why == "of no seed it is among the 1 nearest"
