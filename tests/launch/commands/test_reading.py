"""What a dry run says of the data: bytes a second, and epochs of each bucket, beside the cache and the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import in_two_batches, recipe, start
from typer.testing import CliRunner

from cinemesh.data.cache.version import Version, version_names
from cinemesh.launch.cli import app
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.steps import SAMPLES

pytestmark = pytest.mark.usefixtures("one_process")


def told(path: Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_epochs_and_bytes_are_those_of_the_run(clips: Path, tmp_path: Path) -> None:
    """120 steps of two buckets: what is told before is, within the draw of buckets, what a checkpoint says after."""
    values = in_two_batches(recipe(clips, tmp_path))
    values["cluster"] = "local-cpu"
    values["schedule"] = {"steps": 120, "warmup_steps": 1}
    values["logging"] |= {"every": 60, "validate_every": 0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    before = told(path)["readings"]
    assert [one["epochs"] for one in before] == [None, None] and [one["rows"] for one in before] == [None, None]
    assert "epochs are told where" in CliRunner().invoke(app, ["train", str(path), "--dry-run"]).stdout
    assert start(values, tmp_path) == 0
    said = told(path)
    (name,) = version_names(tmp_path / "cache")
    rows = Version.of(tmp_path / "cache", name).buckets
    newest = latest(tmp_path / "run" / FOLDER)
    assert newest is not None
    taken = read_manifest(newest).note[SAMPLES]
    for one, bucket, samples, step, batch in zip(said["readings"], rows, taken, said["buckets"], (2, 4), strict=True):
        assert (one["bucket"], one["rows"]) == (bucket.bucket, bucket.rows)
        assert one["samples"] == pytest.approx(samples, rel=0.2)
        assert one["epochs"] == pytest.approx(one["samples"] / bucket.rows, rel=0.01)
        # 16 channels of a latent of 4 or 8 values of float32, and 17 words of 12: the tar has its own heads beside.
        latent = 4 * 16 * 4 * (1 if step["latent"].endswith("4x4") else 2) * 4
        assert one["sample_bytes"] == latent + 4 * 17 * 12
        assert one["bytes_per_s"] == pytest.approx(one["sample_bytes"] * batch / step["step_s"])
