"""What a run says of its steps: every number against another way to it, in the log, on a screen and in TensorBoard."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import in_two_buckets, start

from cinemesh.launch import train as entry
from cinemesh.launch.training.predicted import Predicted
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.reports import Done, Reports, StepOf
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import LOG_FILE, Telemetry, read_metrics
from cinemesh.model.step import build_step
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.clusters.cluster import FOLDER, load
from cinemesh.perf_model.prices.played import play_program
from cinemesh.perf_model.report.explain import sample_flops

pytestmark = pytest.mark.usefixtures("one_process")
LINE = re.compile(
    r"step (\d+)/6: loss (?P<loss>[\d.]+), gradient norm (?P<gradient_norm>[\d.e+-]+), lr (?P<lr>[\d.e-]+), "
    r"(?P<step_s>[\d.e-]+) s a step \(predicted (?P<predicted_step_s>[\d.e-]+)\), [\d,]+ tokens/s, "
    r"[\d.]+ GB \(predicted [\d.]+\), MFU [\d.]+%, \d:\d\d:\d\d left"
)


def test_a_mean_is_that_of_its_interval_and_every_step_is_in_one(values: dict[str, Any], tmp_path: Path) -> None:
    """Against a run that reports every step: a last value in a mean's place, or a tail that nobody reports."""
    values["logging"] |= {"every": 1, "validate_every": 0}
    assert start(values, tmp_path) == 0
    each = read_metrics(tmp_path / "run")
    values["logging"] |= {"every": 4, "directory": str(tmp_path / "again")}
    assert start(values, tmp_path) == 0
    rows = read_metrics(tmp_path / "again")
    assert [row["step"] for row in each] == [1, 2, 3, 4, 5, 6] and [row["step"] for row in rows] == [4, 6]
    for row, of in zip(rows, (each[:4], each[4:]), strict=True):
        for name in ("loss", "gradient_norm"):
            assert len({one[name] for one in of}) == len(of)
            assert row[name] == pytest.approx(sum(one[name] for one in of) / len(of), rel=1e-14)
        assert row["lr"] == of[-1]["lr"]


def test_times_of_an_interval_are_means_and_rates_are_of_its_total(values: dict[str, Any]) -> None:
    """By hand: a mean of rates, a skipped update's loss in a mean, or one device's peak for two shows here."""
    config = check_config(values | {"plan": {"dp_shard": 2}}, "test")
    predicted = Predicted(config.plan, "c", "cpu", {}, 5, 1e3)
    buckets = [StepOf("a", 2, 10, 600, 1.5), StepOf("b", 8, 40, 3000, 2.5)]
    reports = Reports(buckets, predicted, config, "cpu", 0, None)
    steps = [Done(0, 0.3, 1.0, 2.0, 4.0), Done(1, 0.2, 4.0, 3.0, 6.0), Done(0, 0.1, 2.0, float("nan"), 1.0)]
    found = reports.values(steps)
    assert 1e8 < found.pop("memory_bytes") < 1e11
    assert found == pytest.approx(
        {
            "lr": 0.1,
            "step_s": 7 / 3,
            "samples_per_step": 4.0,
            "tokens_per_step": 20.0,
            "tokens_per_s": 60 / 7,
            "loss": 2.5,
            "gradient_norm": 5.0,
            "predicted_step_s": 5.5 / 3,
            "predicted_over_measured": 5.5 / 7,
            "predicted_memory_bytes": 5.0,
            "mfu": 4200 / (1e3 * 2 * 7),
            "step_s/a": 1.5,
            "step_s/b": 4.0,
        }
    )
    assert "loss not finite, lr 1.00e-01, 2 s a step" in reports.line(3, reports.values(steps[2:]))


def test_the_time_that_is_left_is_at_the_pace_of_this_start(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of an earlier start took none of its time: 20 s for steps 4 and 5 of 6 leave 10 s, not 4."""
    clock = iter((100.0, 120.0))
    monkeypatch.setattr("cinemesh.launch.training.reports.time.monotonic", lambda: next(clock))
    reports = Reports([StepOf("a", 1, 1, 1, None)], None, check_config(values, "test"), "cpu", 3, None)
    line = reports.line(5, reports.values([Done(0, 0.1, 1.0, 1.0, 1.0)]))
    assert line.startswith("step 5/6: ") and line.endswith("0:00:10 left") and "predicted" not in line


@pytest.fixture
def priced(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe of two buckets and a cluster of CPU processes whose peak is no placeholder."""
    cluster = yaml.safe_load((FOLDER / "local-cpu.yaml").read_text())
    cluster["gpu"]["peak_flops"]["origin"] = "measured"
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(cluster))
    return in_two_buckets(values) | {"cluster": str(tmp_path / "here.yaml")}


def test_what_was_predicted_stands_beside_what_was_measured(
    priced: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the buckets that an interval took (1, 0 | 0, 1 | 1, 1), in every place; MFU by the FLOPs that plan counts."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(priced))
    entry.run(config=path, nproc=None, overrides=[])
    setting, cluster = Setting.of(check_config(priced, "test")), load(priced["cluster"])
    plan = setting.config.plan
    steps = [
        play_program(prepare(build_step(setting.model, plan, batch), backend="gloo"), batch, cluster)
        for batch in setting.batches
    ]
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    taken = [(1, 0), (0, 1), (1, 1)]
    for row, buckets in zip(rows, taken, strict=True):
        assert row["predicted_step_s"] == pytest.approx(sum(steps[b].step_s for b in buckets) / 2)
        assert row["predicted_memory_bytes"] == max(step.footprint.peak_bytes for step in steps)
        flops = sum(2 * sample_flops(setting.model, setting.batches[b].latent) for b in buckets) / 2
        assert row["mfu"] == pytest.approx(flops / (row["step_s"] * cluster.gpu.peak_flops["float32"]))

    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step") and "lr" in line]
    log = (tmp_path / "run" / LOG_FILE).read_text().splitlines()
    assert [line[20:] for line in log if "lr" in line] == said and all(re.match(r"\d{4}-\d\d-\d\d \d", x) for x in log)
    assert "MFU is not shown" not in "".join(log)
    for line, row in zip(said, rows, strict=True):
        match = LINE.fullmatch(line)
        assert match, line
        for name, text in match.groupdict().items():
            assert float(text) == pytest.approx(row[name], rel=6e-3)

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in (*LINE.groupindex, "memory_bytes", "predicted_memory_bytes", "mfu", "tokens_per_s"):
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]


def test_a_prediction_for_other_devices_or_another_plan_is_left_out(
    priced: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number of a GPU beside a CPU's step would pretend."""
    config = check_config(priced, "test")
    for predicted in (
        Predicted(config.plan, "gpus", "cuda", {}, 1, 1.0),
        Predicted(config.plan.with_degrees(dp_shard=2), "here", "cpu", {}, 1, 1.0),
    ):
        predicted.write(tmp_path / "run")
        assert start(priced, tmp_path, "schedule.steps=2") == 0
        assert f"what is predicted of {predicted.cluster} is not of this run on cpu" in capsys.readouterr().out
        assert not any("predicted_step_s" in row for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("cluster", "why"),
    [
        (None, "no cluster is named, of whose peak it is a share"),
        ("grand-teton-h100", "what is predicted of grand-teton-h100 is not of this run on cpu: left out"),
        ("local-cpu", "the peak of local-cpu is a placeholder"),
    ],
)
def test_why_there_is_no_mfu_is_said_once(
    cluster: str | None, why: str, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number that is looked for in vain: in the log, not at every step."""
    plan = check_config(values, "test").plan
    if cluster:
        Predicted(plan, cluster, load(cluster).device, {"1x4x4": 1.0}, 1, None).write(tmp_path / "run")
    assert start({**values, "cluster": cluster}, tmp_path, "schedule.steps=2") == 0
    assert capsys.readouterr().out.count(f"MFU is not shown: {why}\n") == 1
    assert (tmp_path / "run" / LOG_FILE).read_text().count("MFU") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stdout", "shown"), [(Terminal, False), (io.StringIO, True)])
def test_on_a_terminal_the_bar_stands_for_the_lines(
    stdout: type[io.StringIO], shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has them all the same; so has a file that standard output goes to."""
    out, err = stdout(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    telemetry = Telemetry(tmp_path, steps=9, first=0)
    telemetry.say("hello")
    telemetry.advance()
    telemetry.say_step("step 1")
    telemetry.close()
    assert "hello" in out.getvalue() and ("step 1" in out.getvalue()) == shown
    assert "training" in err.getvalue()
    assert [line[20:] for line in (tmp_path / LOG_FILE).read_text().splitlines()] == ["hello", "step 1"]
