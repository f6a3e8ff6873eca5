"""``train --dry-run``: what it says is what a start would write and its steps are priced at; nothing is left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import in_two_buckets, recipe
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.training import resolve
from cinemesh.launch.training.predicted import Predicted
from cinemesh.launch.training.recipe import read_recipe
from cinemesh.launch.training.resolved import Resolved


@pytest.fixture
def path(clips: Path, tmp_path: Path) -> Path:
    """A recipe of two buckets, priced on CPU processes."""
    values = in_two_buckets(recipe(clips, tmp_path)) | {"cluster": "local-cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def told(path: Path, *options: str) -> dict[str, Any]:
    """What the dry run says, as data; the folder is as it was."""
    before = sorted(path.parent.rglob("*"))
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--json", *options])
    assert sorted(path.parent.rglob("*")) == before
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def test_a_given_plan_is_priced_as_its_start_would_write_it(path: Path, tmp_path: Path) -> None:
    """By ``predicted.yaml`` of a start: the second bucket must not be priced as the first, nor its share be even."""
    said = told(path)
    resolve.resolve(*read_recipe(path), 1, rank=0)
    written = Predicted.read(tmp_path / "run")
    assert written is not None and written.plan.to_dict() == said["plan"]
    assert {bucket["latent"]: bucket["step_s"] for bucket in said["buckets"]} == dict(written.step_s)
    assert said["peak_bytes"] == written.peak_bytes == sum(said["bytes"].values()) <= said["limit_bytes"]
    first, second = said["buckets"]
    assert (first["share"], second["share"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert said["step_s"] == pytest.approx(first["step_s"] / 3 + 2 * second["step_s"] / 3)
    assert said["hours"] * 3600 == pytest.approx(said["steps"] * said["step_s"])
    for bucket in said["buckets"]:
        assert bucket["tokens_per_s"] * bucket["step_s"] == pytest.approx(said["global_batch"] * bucket["tokens"])
        assert 0 < bucket["mfu"] < 1 and math.isclose(bucket["peak_bytes"], said["peak_bytes"], rel_tol=0.5)


def test_a_plan_left_to_the_planner_is_the_one_a_start_would_choose(path: Path, tmp_path: Path) -> None:
    said = told(path, "--ranks", "2", "--set", "plan=auto")
    resolve.resolve(*read_recipe(path, ["plan=auto"]), 2, rank=0)
    known = Resolved.read(tmp_path / "run")
    assert known is not None and known.plan.to_dict() == said["plan"] and said["ranks"] == 2


def test_people_read_the_same(path: Path) -> None:
    said = CliRunner().invoke(app, ["train", str(path), "--dry-run"]).stdout
    assert "on 1 devices of local-cpu" in said and "nothing was started or written" in said
    assert "most memory: " in said and " device hours, without validation" in said
    lines = [line for line in said.splitlines() if line.startswith(tuple(b["latent"] for b in told(path)["buckets"]))]
    assert [line.split()[2] for line in lines] == ["33%", "67%"]


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--dry-run", "--ranks", "3"], r"world size 3; change the plan's degrees"),
        (["--dry-run", "--set", "plan=auto"], r"its plan is auto; say for how many devices: --ranks"),
        (["--dry-run", "--set", "cluster=null"], r"it names no cluster to price its steps on; add --set cluster="),
        (["--ranks", "2"], r"^--ranks says nothing to a run that starts; add --dry-run"),
        (["--json"], r"^--json says nothing to a run that starts; add --dry-run"),
    ],
)
def test_what_cannot_be_is_refused(path: Path, options: list[str], refused: str) -> None:
    done = CliRunner().invoke(app, ["train", str(path), *options])
    assert isinstance(done.exception, CinemeshError)
    with pytest.raises(CinemeshError, match=refused):
        raise done.exception


def test_a_plan_that_does_not_fit_is_refused_as_its_start_would_be(path: Path, tmp_path: Path) -> None:
    """The same message, before anything was started."""
    small = yaml.safe_load(
        "base: local-cpu\nmemory: {usable_bytes: {value: 0.3, unit: GB, origin: measured, source: x}}"
    )
    (tmp_path / "small.yaml").write_text(
        yaml.safe_dump(small | {"sources": {"x": {"title": "here", "date": "2026-01-01"}}})
    )
    with pytest.raises(CinemeshError, match=r"GB on each device .* more than the 0.30 GB of local-cpu"):
        told(path, "--set", f"cluster={tmp_path / 'small.yaml'}")
