"""What a run measured becomes rows, and ``cinemesh validate`` predicts them with the program that ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
import yaml
from harness import Pool
from training import in_two_buckets, recipe
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training import measured_rows
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.loop import train_steps
from cinemesh.launch.training.measured_rows import ROWS_FILE, MeasuredRows
from cinemesh.launch.training.recipe import check_config, read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.buckets import BucketRunner
from cinemesh.model.runner import StepRunner
from cinemesh.parallel.runtime.mesh import Mesh
from cinemesh.perf_model.published.validate import ROWS

pytestmark = pytest.mark.usefixtures("one_process")


def answer(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return yaml.safe_load((folder / ROWS_FILE).read_text())


def train_rank(path: Path) -> None:
    """One rank of a run in the pool."""
    setting = Setting.of(read_config(path))
    mesh = Mesh(setting.config.plan)
    place = Joined(mesh.rank, "cpu", mesh)
    train_steps(setting, place, open_history(setting, place), StopSignal())
    mesh.close()


def train_alone(values: dict[str, Any]) -> None:
    """A run on this process."""
    setting, place = Setting.of(check_config(values, "test")), Joined(0, "cpu", None)
    train_steps(setting, place, open_history(setting, place), StopSignal())


def test_a_run_on_processes_gives_rows_that_validate_predicts(pool: Pool, clips: Path, tmp_path: Path) -> None:
    """By the price that the recipe's dry run gives each bucket: a row that lost its plan, shape or model errs."""
    values = in_two_buckets(recipe(clips, tmp_path, dp_shard=2, recompute="full"))
    values["schedule"]["steps"] = 30
    values["data"]["buckets"][1]["global_batch"] = 4
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    pool.run(2, train_rank, path)
    own = answer("validate", tmp_path / "run" / ROWS_FILE)["own"]
    dry = answer("train", path, "--dry-run", "--ranks", 2, "--set", "cluster=local-cpu")
    assert [row["id"] for row in own] == ["run/1x4x4/from-step-0", "run/1x4x8/from-step-0"]
    assert [row["predicted_s"] for row in own] == [bucket["step_s"] for bucket in dry["buckets"]]
    assert sum(row["steps"] for row in own) == 30 - 2 * 3, "three of each are warm-up"
    assert [row["global_batch"] for row in own] == [2, 4]
    for row in own:
        assert (row["gpus"], row["cluster"]) == (2, "local-cpu")
        assert row["plan"] == dry["plan"] and row["ratio"] == row["predicted_s"] / row["measured_s"]
        assert 0 < row["measured_s_low"] <= row["measured_s"] <= row["measured_s_high"] < 10
    assert rows_of(tmp_path / "run")[0]["software"]["captured"] is True


def test_an_interrupted_run_has_its_rows_and_a_resumed_one_keeps_them(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_at_once: None
) -> None:
    """It dies in step 9 of 16 with a checkpoint at 8: five steps behind the warm-up are told, of either start."""
    values["schedule"]["steps"] = 16
    values["logging"] |= {"checkpoint_every": 8, "validate_every": 0}
    step = StepRunner.step

    def dies(self: StepRunner, lr: float, *given: Any, **how: Any) -> None:
        if self.steps_done == 8:
            raise CinemeshError("the node is gone")
        step(self, lr, *given, **how)

    torch.set_num_threads(1)  # more would wait for one another, on these sizes
    with monkeypatch.context() as patch, pytest.raises(CinemeshError, match="the node is gone"):
        patch.setattr(StepRunner, "step", dies)
        train_alone(values)
    (first,) = rows_of(tmp_path / "run")
    assert (first["measured"]["steps"], first["hardware"]["gpus"]) == (5, 1)
    train_alone(values)
    kept, second = rows_of(tmp_path / "run")
    assert kept == first and second["id"] == "run/1x4x4/from-step-8" and second["measured"]["steps"] == 5


# -- a row by hand ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(values: dict[str, Any], tmp_path: Path) -> MeasuredRows:
    """Of a run that has taken no step."""
    setting = Setting.of(check_config(values, "test"))
    runners = BucketRunner(setting.blueprints("cpu", setting.batches), None)
    (tmp_path / "run").mkdir()
    return MeasuredRows(setting.config, runners, setting.latents)


@pytest.fixture
def path(measured: MeasuredRows, tmp_path: Path) -> Path:
    """A file with one row of a step of 20.5 s."""
    for seconds in (900.0, 900.0, 900.0, *map(float, range(40, 0, -1))):
        measured.add(0, seconds, seconds / 10.0)
    measured.write()
    return tmp_path / "run" / ROWS_FILE


def changed(path: Path, key: str, value: object) -> None:
    """Another value in the only row of a file, by its dotted key."""
    (row,) = yaml.safe_load(path.read_text())
    *parts, last = key.split(".")
    at = row
    for part in parts:
        at = at[part]
    at[last] = value
    path.write_text(yaml.safe_dump([row]))


def test_times_are_the_median_and_the_middle_nine_tenths_behind_the_warm_up(path: Path, measured: MeasuredRows) -> None:
    """Of the seconds 1 to 40: the first three would pull any mean or bound away."""
    (row,) = rows_of(path.parent)
    assert row["measured"] == {
        "iter_time_s": 20.5,
        "iter_time_low_s": 3.0,
        "iter_time_high_s": 38.0,
        "loading_s": pytest.approx(2.05),
        "steps": 40,
        "warm_up_steps": 3,
    }


def test_a_driver_that_tells_no_clock_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a part of a GPU NVML refuses, at a checkpoint, hours into a run: the row says null."""

    def refuse(_: str) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "clock_rate", refuse)
    assert measured_rows.clock_mhz("cuda:0") is None
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda _: 1755)
    assert measured_rows.clock_mhz("cuda:0") == 1755


def test_steps_that_are_too_few_are_no_row(measured: MeasuredRows, tmp_path: Path) -> None:
    for _ in range(5):
        measured.add(0, 1.0, 0.1)
    measured.write()
    assert not (tmp_path / "run" / ROWS_FILE).exists()
    measured.add(0, 1.0, 0.1)
    measured.write()
    assert rows_of(tmp_path / "run")[0]["measured"]["steps"] == 3


def test_the_prediction_follows_what_the_row_says(path: Path, tmp_path: Path) -> None:
    """Plan, packages, capture and cluster each move it; the bar is the cluster's and judges the median."""

    def predicted(*options: object) -> dict[str, Any]:
        (row,) = answer("validate", path, *options)["own"]
        return row

    first = predicted()
    changed(path, "plan.recompute", "full")
    assert predicted()["predicted_s"] > first["predicted_s"]
    slow = tmp_path / "slow.yaml"  # to launch a kernel takes 1 ms
    told = {"value": 1000.0, "unit": "us", "origin": "measured", "source": "x"}
    about = {"name": "slow", "base": "dgx-h100-ib400", "sources": {"x": {"title": "here", "date": "2026-01-01"}}}
    slow.write_text(yaml.safe_dump(about | {"launch": {"eager_s": told}}))
    changed(path, "hardware.cluster", str(slow))
    changed(path, "plan.dtype", "bf16")
    changed(path, "software.captured", True)
    captured = predicted()
    assert captured["cluster"] == "slow" and predicted("--cluster", "local-cpu")["cluster"] == "local-cpu"
    changed(path, "software.captured", False)
    eager = predicted()
    assert eager["predicted_s"] > 10 * captured["predicted_s"], "launched one by one"
    low, high = eager["predicted_s_low"], eager["predicted_s_high"]
    for seconds, within in ((low * 0.99, False), (low * 1.01, True), (high * 0.99, True), (high * 1.01, False)):
        for name in ("iter_time_s", "iter_time_low_s", "iter_time_high_s"):
            changed(path, f"measured.{name}", seconds)
        assert predicted()["within"] is within
    changed(path, "software.packages", ["flash-attn-3"])
    assert predicted()["error_bar"] != eager["error_bar"], "of another attention kernel"


def test_files_are_read_together_and_own_rows_beside_published_ones(path: Path, tmp_path: Path) -> None:
    published = yaml.safe_load(ROWS.read_text())[:1]
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(yaml.safe_dump([*published, *yaml.safe_load(path.read_text())]))
    told = answer("validate", path, mixed)
    assert len(told["own"]) == 2 and [row["id"] for row in told["rows"]] == [published[0]["id"]]
    shown = CliRunner().invoke(app, ["validate", str(path)]).stdout
    assert "own run  " in shown and "20.5 (3 to 38)" in shown and "absolute error of time" not in shown
    assert "OUTSIDE" in shown and "local-cpu: ± " in shown


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hardware.gpus", 2, r"= 1 != hardware.gpus\(2\); write the plan and the GPUs of one run"),
        ("hardware.gpus", 0, r"hardware.gpus is 0; it must be 1 to 16,777,216: no cluster has more"),
        ("hardware.cluster", None, r"hardware.cluster is null; name a cluster there, or give --cluster"),
        ("hardware.cluster", "dgx-h100", r"cluster: 'dgx-h100' is unknown; did you mean 'dgx-h100-ib400'"),
        ("hardware.clock_mhz", "fast", r"hardware.clock_mhz is 'fast'; it must be a whole number"),
        ("software.packages", ["fa9"], r"package 'fa9' is none beside torch"),
        ("software.kernels", {"attention": 3}, r"software.kernels.attention is 3; it must be a text"),
        ("software.captured", "yes", r"software.captured is 'yes'; it must be true or false"),
        ("model.width", 7, r"model: .*width\(7\) % heads\(6\) = 1; every head needs the same width"),
        ("model.widht", 7, r"model: unknown key 'widht'; did you mean 'width'"),
        (
            "shape.samples",
            3,
            r"shape.samples\(3\) \* data ranks\(1\) \* micro_batches\(1\) = 3 != shape.global_batch\(2\)",
        ),
        ("shape.latent", [1, 4], r"shape.latent is \[1, 4\]; it must be a list of 3"),
        ("shape.latent", [9, 4, 4], r"T\(9\) / patch\(1\) = 9 positions, .* has 6; use a smaller latent"),
        ("plan.tp", 0, r"tp is 0"),
        ("plan.tq", 2, r"plan: unknown key 'tq'; known: tp, cp, "),
        ("measured.iter_time_s", -1.0, r"measured.iter_time_s is -1.0; it must be above 0, to 1000000"),
        ("measured.iter_time_s", 39.0, r"iter_time_s\(39\) is not from iter_time_low_s\(3\) to iter_time_high_s\(38\)"),
        ("measured.steps", 0, r"measured.steps is 0; it must be 1 to "),
        ("more", 1, r"unknown key 'more'"),
        ("id", "", r"its id is ''; give every row an id of its own"),
        ("kind", "own", r"kind is 'own'; choose one of training_step, .*own_step"),
    ],
)
def test_a_row_that_cannot_be_is_one_error_with_value_rule_and_remedy(
    path: Path, key: str, value: object, said: str
) -> None:
    changed(path, key, value)
    with pytest.raises(CinemeshError, match=rf"^the rows file \S+: row \S*: .*{said}") as refused:
        answer("validate", path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_part_that_is_not_there_is_named(path: Path) -> None:
    (row,) = yaml.safe_load(path.read_text())
    del row["measured"]["steps"]
    path.write_text(yaml.safe_dump([row]))
    with pytest.raises(CinemeshError, match=r": measured has no steps; add it"):
        answer("validate", path)


def test_a_file_in_the_way_of_the_rows_is_told_before_the_first_step(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ROWS_FILE).write_text("a note of mine")
    with pytest.raises(CinemeshError, match=r"'a note of mine', no list; move it away, and this start writes another"):
        train_alone(values)
