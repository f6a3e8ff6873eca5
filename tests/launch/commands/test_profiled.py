"""A recipe's own steps, profiled: what is written is read by those whom it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Pool
from training import in_two_buckets, recipe
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.kernels.ops import OPS
from cinemesh.launch.cli import app
from cinemesh.launch.cluster.processes import Joined
from cinemesh.launch.commands.profile_samples import samples_of
from cinemesh.launch.commands.profile_shown import ToldProfile
from cinemesh.launch.commands.profile_steps import batch_of, take_steps
from cinemesh.launch.proof.traced import TakenSteps
from cinemesh.launch.training.recipe import read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.records import COMPUTE_LANE
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.played import play_program

pytestmark = pytest.mark.usefixtures("one_process")


def written(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def cinemesh(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_a_recipe_is_profiled_and_what_is_written_is_of_use(clips: Path, tmp_path: Path) -> None:
    """By the doors that read it: validate takes the row, calibrate the samples, and the same steps err less then."""
    path = written(in_two_buckets(recipe(clips, tmp_path)), tmp_path)
    out = tmp_path / "profiled"
    told = json.loads(cinemesh("profile", path, "--steps", 6, "--latent", "1x4x4", "--out", out, "--json"))
    assert sorted(one.name for one in out.iterdir()) == ["profile.html", "profile.json", "rows.yaml", "trace.json"]
    assert not (tmp_path / "run" / "checkpoints").exists(), "nothing is kept of what the steps learn"
    assert told["about"].startswith("tiny, 1x4x4,") and told["cluster"] == "local-cpu" and told["steps"] == 6
    held = sum(lane["held_s"] for lane in told["lanes"])
    assert held == pytest.approx(told["step_s"]), "what lanes held is the watched step"
    assert told["error"] == pytest.approx(
        sum(abs(row["ran_s"] - row["predicted_ran_s"]) for row in told["rows"]) / sum(r["ran_s"] for r in told["rows"])
    )
    own = json.loads(cinemesh("validate", out / "rows.yaml", "--json"))["own"]
    assert [row["id"] for row in own] == [f"{tmp_path.name}/profiled/1x4x4"] and own[0]["steps"] == 3
    assert own[0]["predicted_s"] == pytest.approx(told["predicted_step_s"])
    cinemesh("calibrate", "--profile", out / "profile.json", "--base", "local-cpu", "--out", tmp_path / "here.yaml")
    again = json.loads(cinemesh("validate", out / "rows.yaml", "--cluster", tmp_path / "here.yaml", "--json"))["own"]
    assert again[0]["cluster"] == "here" and again[0]["predicted_s"] != own[0]["predicted_s"]


def take_rank(path: Path) -> TakenSteps:
    """One rank of a profile in the pool."""
    setting = Setting.of(read_config(path))
    mesh = Mesh(setting.config.plan)
    _, taken = take_steps(setting, Joined(mesh.rank, "cpu", mesh), batch_of(setting, None), 3)
    mesh.close()
    return taken


def test_on_several_ranks_every_record_is_seen_beside_its_price(pool: Pool, clips: Path, tmp_path: Path) -> None:
    """Each op and collective of the program that ran, once a rank and step; after levels the same plan errs less."""
    path = written(recipe(clips, tmp_path, dp_shard=2, prefetch=1, recompute="full"), tmp_path)
    setting = Setting.of(read_config(path))
    batch, config = batch_of(setting, None), setting.config
    program = prepare(build_step(setting.model, config.plan, batch, config.optimizer, seed=config.seed), backend="gloo")
    by_rank = pool.run(2, take_rank, path)
    records = [op.name for op in program.ops if not op.is_wait]
    for taken in by_rank:
        assert len(taken.plain_s) == len(taken.watched) == 3 and min(taken.loading_s) > 0
        for spans in taken.watched:
            assert [span.name for span in spans if span.kind != "wait"] == records
    whole = play_program(program, batch, load("local-cpu"))
    told = ToldProfile.of("a test", load("local-cpu"), whole, by_rank)
    assert told.profile.steps == 6 and all(row.predicted_ran_s > 0 for row in told.profile.rows)
    samples = samples_of(program, [taken.watched for taken in by_rank], 2)
    assert sum(s.count for s in samples if s.part != "collectives") == sum(op.kind in OPS for op in program.ops)
    assert sum(s.count for s in samples if s.part == "collectives") == len(records) - sum(
        op.kind in OPS for op in program.ops
    )
    assert all(sample.key[1:] == (2, 1) for sample in samples if sample.part == "collectives")
    assert {lane.lane for lane in told.profile.lanes} > {COMPUTE_LANE, "dp_shard*cp:all_gather"}


def test_what_the_recipe_has_not_is_refused(clips: Path, tmp_path: Path) -> None:
    path = written(recipe(clips, tmp_path), tmp_path)
    with pytest.raises(CinemeshError, match=r"--latent 3x3x3 is no bucket of the recipe.*1x4x4"):
        cinemesh("profile", path, "--latent", "3x3x3")
    with pytest.raises(CinemeshError, match="world size"):
        cinemesh("profile", path, "--nproc", 2)
    with pytest.raises(CinemeshError, match=r"run on cpu, and dgx-h100-ib400 has prices of cuda.*local-cpu"):
        cinemesh("profile", path, "--cluster", "dgx-h100-ib400")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
