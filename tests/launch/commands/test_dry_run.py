"""Recipes foretold: ``train --dry-run``, ``plan CONFIG``, ``explain --recipe``. Nothing is left behind.

What they say is what a start would write and its steps are priced at.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import in_two_batches, recipe
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.training import resolve
from cinemesh.launch.training.predicted import Predicted
from cinemesh.launch.training.recipe import read_recipe
from cinemesh.launch.training.resolved import Resolved
from cinemesh.parallel.ir.plan import Plan


@pytest.fixture
def path(clips: Path, tmp_path: Path) -> Path:
    """A recipe of two buckets with batches of their own, priced on CPU processes."""
    values = in_two_batches(recipe(clips, tmp_path)) | {"cluster": "local-cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def told(path: Path, *options: str) -> dict[str, Any]:
    """What the dry run says, as data; the folder is as it was."""
    before = sorted(path.parent.rglob("*"))
    said = answer("train", str(path), "--dry-run", *options)
    assert sorted(path.parent.rglob("*")) == before
    return said


def answer(*words: str) -> dict[str, Any]:
    """What a command says, as data."""
    done = CliRunner().invoke(app, [*words, "--json"])
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
    assert [bucket["global_batch"] for bucket in said["buckets"]] == [2, 4] and said["global_batch"] == 2
    for bucket in said["buckets"]:
        assert bucket["tokens_per_s"] * bucket["step_s"] == pytest.approx(bucket["global_batch"] * bucket["tokens"])
        assert 0 < bucket["mfu"] < 1 and math.isclose(bucket["peak_bytes"], said["peak_bytes"], rel_tol=0.5)


def test_a_plan_left_to_the_planner_is_the_one_a_start_would_choose(path: Path, tmp_path: Path) -> None:
    """And the one that ``plan CONFIG --tune`` finds, whose request is made elsewhere."""
    auto = "plan={auto: true, dtype: float32}"
    said = told(path, "--ranks", "2", "--set", auto)
    resolve.resolve(*read_recipe(path, [auto]), 2, rank=0)
    known = Resolved.read(tmp_path / "run")
    assert known is not None and known.plan.to_dict() == said["plan"] and said["ranks"] == 2
    assert answer("plan", str(path), "--gpus", "2", "--tune", "--top", "1")["plans"][0]["plan"] == said["plan"]


def test_a_plan_that_the_run_has_already_is_the_one_that_is_shown(path: Path, tmp_path: Path) -> None:
    """A resume keeps it; the planner would choose no such plan."""
    slow = replace(Plan.parse("tp=2,dtype=float32"), recompute="full")
    Resolved(slow, "local-cpu", 1.0, 1, 2, (2, 4)).write(tmp_path / "run")
    said = told(path, "--ranks", "2", "--set", "plan=auto")
    assert said["plan"] == slow.to_dict()


# -- plan CONFIG ------------------------------------------------------------------------------------------------------


def test_a_run_under_the_planners_best_plan_is_what_its_dry_run_says(path: Path, tmp_path: Path) -> None:
    """Every number of it, both buckets."""
    out = str(tmp_path / "best.yaml")
    said = answer("plan", str(path), "--gpus", "2", "--top", "1", "--out", out)
    run = told(path, "--plan", out, "--ranks", "2")
    assert said["run"] == {key: run[key] for key in said["run"]} and len(run["buckets"]) == 2
    assert said["plans"][0]["step_s"] == pytest.approx(run["step_s"], rel=1e-3)
    assert said["taken"] == {
        "model": "tiny",
        "latents": "1x4x4, 1x4x8",
        "global batch": "2 + 4",
        "dtype": "float32",
        "cluster": "local-cpu",
        "packages": "none (what is installed here)",
    }


def test_options_win_over_the_recipe_and_are_not_said_to_be_taken(path: Path) -> None:
    """Each is seen in the answer: one that is read and dropped would be told as it was given."""
    given = ["--global-batch", "4", "--dtype", "bf16", "--latent", "1x4x8", "--packages", "fa3", "--servers", "2"]
    said = answer("plan", str(path), "--top", "1", "--cluster", "dgx-h100-ib400", "--gpus", "16", *given)
    best = said["plans"][0]
    assert (best["gpus"], best["global_batch"], best["plan"]["dtype"]) == (16, 4, "bf16")
    assert [bucket["latent"] for bucket in said["run"]["buckets"]] == ["1x4x8"] and said["cluster"] == "dgx-h100-ib400"
    assert "flash-attn-3" in {kernel["package"] for kernel in said["kernels"]} and said["taken"] == {"model": "tiny"}
    own = answer("plan", str(path), "--samples", "3", "--model", "tiny-video", "--top", "1")
    assert (own["plans"][0]["global_batch"], own["run"]["global_batch"], own["plans"][0]["gpus"]) == (3, 3, 1)
    assert {"model", "global batch"}.isdisjoint(own["taken"])
    assert own["run"]["bytes"]["optimizer"] > 10 * told(path)["bytes"]["optimizer"], "that of the recipe's model"


def test_fields_that_a_recipe_holds_are_held(path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(path.read_text()) | {"plan": {"auto": True, "dtype": "float32", "tp": 2}}
    path.write_text(yaml.safe_dump(values))
    said = answer("plan", str(path), "--gpus", "2")
    assert {(row["plan"]["tp"], row["plan"]["dtype"]) for row in said["plans"]} == {(2, "float32")}
    assert said["taken"]["plan fields"] == "tp=2" and said["taken"]["dtype"] == "float32"
    by_hand = answer("plan", str(path), "--gpus", "2", "--fix", "tp=1", "--dtype", "float64")
    assert {(row["plan"]["tp"], row["plan"]["dtype"]) for row in by_hand["plans"]} == {(1, "float64")}
    with pytest.raises(CinemeshError, match=r"^for how many GPUs is not said; add --gpus 6144"):
        answer("plan", str(path))


def test_a_given_plan_is_explained_in_the_recipes_largest_bucket(path: Path) -> None:
    """By the dry run's own step of it; and the text says once what was taken."""
    second = told(path, "--ranks", "2", "--plan", "dp_shard=2,dtype=float32")["buckets"][1]
    said = answer("explain", "dp_shard=2", "--recipe", str(path))
    assert (said["step_s"], said["global_batch"]) == (second["step_s"], 4) and said["plan"]["dtype"] == "float32"
    assert said["taken"]["latents"] == "1x4x8 (the largest of 2)" and said["model"] == str(path)
    both = answer("compare", "dp_shard=2", "tp=2,dtype=float64", "--recipe", str(path), "--latent", "1x4x4")
    assert [plan["plan"]["dtype"] for plan in both["plans"]] == ["float32", "float64"]
    assert "latents" not in both["taken"] and both["taken"]["dtype"] == "float32"
    shown = CliRunner().invoke(app, ["compare", "dp_shard=2", "tp=2", "--recipe", str(path)]).stdout
    assert shown.count(f"taken from {path}: model tiny; latents 1x4x8 (the largest of 2); global batch 4;") == 1


def test_without_a_recipe_nothing_is_said_to_be_taken() -> None:
    said = answer("plan", "--model", "tiny", "--gpus", "2", "--samples", "1", "--top", "1")
    assert said["taken"] == {} and said["run"] is None and said["cluster"] == "grand-teton-h100"


# -- as people read it ------------------------------------------------------------------------------------------------


def test_people_read_the_same(path: Path) -> None:
    said = CliRunner().invoke(app, ["train", str(path), "--dry-run"]).stdout
    assert "on 1 devices of local-cpu" in said and "nothing was started or written" in said
    assert "most memory: " in said and " device hours, without validation" in said
    lines = [line for line in said.splitlines() if line.startswith(tuple(b["latent"] for b in told(path)["buckets"]))]
    assert [line.split()[2] for line in lines] == ["33%", "67%"]
    planned = CliRunner().invoke(app, ["plan", str(path), "--fix", "recompute=none"]).stdout
    below = planned[planned.index("a run of it under the best plan") :]
    assert all(line in below for line in lines)
    assert said[said.index("most memory: ") : said.index(" and restarts")] in below


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--dry-run", "--ranks", "3"], r"world size 3; change the plan's degrees"),
        (["--dry-run", "--ranks", "1", "--nproc", "2"], r"--ranks 1 and --nproc 2 both say .*; leave one of them out"),
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


def test_it_ends_in_a_verdict_with_failures_where_the_cluster_has_any(path: Path) -> None:
    """On one that says nothing of failures, days are the steps' alone; else what is lost makes the run longer."""
    here = told(path)
    assert here["lifetime"] is None and here["days"] == pytest.approx(here["hours"] / 24)
    assert "where nothing fails" in here["verdict"] and here["start_up"]["communicators"] == 0
    there = told(path, "--set", "cluster=grand-teton-h100", "--set", "plan.dp_shard=2", "--ranks", "2")
    lives = there["lifetime"]
    assert there["days"] == pytest.approx(there["hours"] / 24 / lives["usual"]["shares"]["training"])
    assert there["days"] > there["hours"] / 24 and there["start_up"]["communicators"] > 0
    assert f"every {lives['usual']['steps']:,} steps" in there["verdict"] and lives["pause_s"] > 0
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--set", "cluster=grand-teton-h100"])
    assert done.exit_code == 0 and "pauses the run for" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits: ")
