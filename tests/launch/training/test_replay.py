"""A step of a run once more: the numbers that the run itself measured, from whatever checkpoint lies before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import start

from cinemesh.errors import CinemeshError
from cinemesh.launch.training import replay
from cinemesh.launch.training.numerics import NUMERICS_FILE
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.model.inputs import LATENTS
from cinemesh.model.runner import Batch, StepRunner

pytestmark = pytest.mark.usefixtures("one_process", "written_at_once")


@pytest.fixture
def trained(values: dict[str, Any], tmp_path: Path) -> Path:
    """Six steps, each reported and measured; checkpoints of steps 3 and 6. The recipe."""
    values["logging"] |= {"every": 1, "numerics_every": 1, "checkpoint_every": 3, "keep": 9}
    assert start(values, tmp_path) == 0
    return tmp_path / "recipe.yaml"


def replayed(
    recipe: Path, step: int, capsys: pytest.CaptureFixture[str], *overrides: str, exact: bool = False
) -> dict[str, Any]:
    capsys.readouterr()
    code = replay.run(config=recipe, step=step, nproc=None, overrides=overrides, exact=exact, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert code == (found["bad"] is not None)
    return found


def test_it_is_the_step_of_the_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit by bit, from a checkpoint and from the random start; another batch, draw or rate shows in every number."""
    run = tmp_path / "run"
    measured = {line["step"]: line for line in map(json.loads, (run / NUMERICS_FILE).read_text().splitlines())}
    losses = {row["step"]: row for row in read_metrics(run) if "loss" in row}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for step, begun in ((2, "random weights"), (3, "random weights"), (5, "step-00000003"), (6, "step-00000003")):
        found = replayed(trained, step, capsys)
        assert found.pop("from").endswith(begun)
        assert (found.pop("loss"), found.pop("gradient_norm")) == (losses[step]["loss"], losses[step]["gradient_norm"])
        assert found.pop("dtype") == "float32" and found == measured[step]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "nothing of the run is written"


def test_in_float64_rounding_is_gone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From float32 states, exactly; so close, and not the same."""
    plain, exact = replayed(trained, 5, capsys), replayed(trained, 5, capsys, exact=True)
    assert exact["dtype"] == "float64" and exact["loss"] != plain["loss"]
    assert exact["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    other = replayed(trained, 5, capsys, "plan.dtype=bf16")
    assert other["dtype"] == "bf16" and 1e-6 < abs(other["loss"] / plain["loss"] - 1) < 0.1, "states are cast"
    for a, b in zip(exact["residual"], plain["residual"], strict=True):
        assert a["amax"] == pytest.approx(b["amax"], rel=1e-4)


def test_a_damaged_checkpoint_is_passed_over(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For an earlier one; where there is none but damaged ones, random weights are not taken for it."""
    file = tmp_path / "run/checkpoints/step-00000003/00000.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert replay.run(config=trained, step=5, nproc=None, overrides=[], exact=False, as_json=True) == 2
    assert "no whole checkpoint before step 5" in capsys.readouterr().err


def test_what_is_not_finite_is_named(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words too, and by the exit code."""
    load = StepRunner.load

    def loaded(self: StepRunner, micro_batch: int, batch: Batch) -> None:
        load(self, micro_batch, {**batch, **({LATENTS: batch[LATENTS] + 1e30} if self.steps_done == 4 else {})})

    monkeypatch.setattr(StepRunner, "load", loaded)
    assert replayed(trained, 5, capsys)["bad"]["bad"]["kind"] == "velocity_loss"
    assert replay.run(config=trained, step=5, nproc=None, overrides=[], exact=False, as_json=False) == 1
    shown = capsys.readouterr().out
    assert "first not finite: mb0/final.forward/loss (velocity_loss), 1 of 1 values" in shown and "blocks.1" in shown


@pytest.mark.parametrize(
    ("step", "override", "message"),
    [
        (7, "seed=0", "--step 7: the run has steps 1 to 6"),
        (5, "seed=5", "not as in the run so far: seed: 0 -> 5"),
        (5, "model.layers=1", "is of another model"),
        (5, "logging.directory=elsewhere", "no run in elsewhere"),
    ],
)
def test_another_run_is_no_replay(
    trained: Path, capsys: pytest.CaptureFixture[str], step: int, override: str, message: str
) -> None:
    capsys.readouterr()
    try:
        assert replay.run(config=trained, step=step, nproc=None, overrides=[override], exact=False, as_json=True) == 2
        said = capsys.readouterr().err
    except CinemeshError as error:  # before any rank is there
        said = str(error)
    assert message in said


def test_two_ranks_say_the_same(values: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Under another plan than the run's, in float64: to rounding."""
    values["logging"] |= {"checkpoint_every": 3, "keep": 9}
    values["plan"]["dtype"] = "float64"
    assert start(values, tmp_path) == 0
    found = []
    for plan, nproc in (("", None), ("tp=2", 2)):
        capfd.readouterr()
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        overrides = ["plan.tp=2"] if plan else []
        assert (
            replay.run(
                config=tmp_path / "recipe.yaml", step=5, nproc=nproc, overrides=overrides, exact=False, as_json=True
            )
            == 0
        )
        found.append(json.loads(capfd.readouterr().out))
    alone, two = found
    assert two["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert two["residual"] == [pytest.approx(block, rel=1e-10) for block in alone["residual"]]
    assert two["logits"] == pytest.approx(alone["logits"], rel=1e-10)
