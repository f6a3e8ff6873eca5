"""``launch local``: two agents of torchrun with a rank each, as two nodes would have them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import cinemesh, recipe, start

from cinemesh.launch.training.telemetry import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")


def losses(folder: Path) -> list[float]:
    rows: list[dict[str, Any]] = [*read_metrics(folder / "run")]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_agents_train_as_one_process_does(clips: Path, tmp_path: Path) -> None:
    """Only here do agents meet as those of two nodes: static ranks, one address, the plan by its text."""
    two, one = tmp_path / "two", tmp_path / "one"
    for folder in (two, one):
        folder.mkdir()
    path = two / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(clips, two)))
    done = subprocess.run(
        cinemesh("launch", "local", path, "--plan", "dp_shard=2,dtype=float32"),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("recipe: 2 ranks, 1 on each of 2 nodes\n")
    assert start(recipe(clips, one), one) == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(one)) == 3
