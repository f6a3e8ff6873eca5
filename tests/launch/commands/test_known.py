"""``cinemesh list`` and ``--version``: what they name is what other commands take."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cinemesh.launch.cli import app
from cinemesh.launch.training.recipe import read_config
from cinemesh.model.config import PRESETS
from cinemesh.perf_model.clusters.cluster import load


def test_everything_listed_is_taken_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From any directory; parameters are the paper's 30B and 5B, not a round number of ours."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["list", "--json"])
    found = json.loads(done.stdout)
    assert {row["name"] for row in found["models"]} == set(PRESETS)
    assert {row["name"]: row["parameters"] for row in found["models"]}["movie-gen-30b"] == 29_303_494_656
    assert {row["name"]: row["gpus"] for row in found["clusters"]}["grand-teton-h100"] == 6144
    assert all(load(row["name"]).gpu.memory_bytes == row["memory_bytes"] for row in found["clusters"])
    assert [row["name"] for row in found["encoders"]] == ["ul2", "metaclip", "byt5", "bytes", "any other"]
    assert {Path(row["name"]).name for row in found["recipes"]} >= {"quickstart.yaml", "buckets.yaml"}
    for row in found["recipes"]:
        assert read_config(Path(row["name"])).model.preset in PRESETS
    text = CliRunner().invoke(app, ["list"]).stdout
    assert all(str(row["name"]) in text for kind in ("models", "clusters", "encoders") for row in found[kind])


def test_version_names_the_packages_without_loading_them() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"cinemesh {version('cinemesh')}, python 3.")
    assert f", torch {version('torch')}" in done.stdout
