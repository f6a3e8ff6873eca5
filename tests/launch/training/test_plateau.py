"""A learning rate that is cut where the held-out loss stands still: by hand, in a run, and in one that was resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training import failure, recipe, refusal, start, states, stop_in_step

from cinemesh.launch.training.checkpoint.choosing import FOLDER
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.plateau import VALIDATIONS, plateaus
from cinemesh.launch.training.recipe import ScheduleSection
from cinemesh.launch.training.telemetry import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize(
    ("losses", "patience", "due"),
    [
        ([], 1, 0),
        ([3.0], 1, 0),  # the first is the best so far
        ([3.0, 2.0, 1.0], 1, 0),
        ([3.0, 3.0], 1, 1),
        ([3.0, 2.95], 1, 1),  # lower by less than its error of 0.1
        ([3.0, 2.85], 1, 0),
        ([3.0, 3.1, 3.1], 2, 1),
        ([3.0, 3.1, 2.0, 2.1], 2, 0),  # a better one begins the count anew
        ([3.0, *[3.1] * 6], 3, 2),  # and so does a cut
        ([3.0, 2.95, 2.95, 2.85], 2, 1),  # small steps do not move what is compared with
    ],
)
def test_plateaus_are_counted_as_by_hand(losses: list[float], patience: int, due: int) -> None:
    assert plateaus([(step, loss, 0.1) for step, loss in enumerate(losses)], patience) == due


def test_the_rate_follows_from_the_validations_alone() -> None:
    schedule = ScheduleSection(steps=9, warmup_steps=2, decay="plateau", cut=0.25, patience=1)
    flat = [(step, 1.0, 0.0) for step in range(3)]
    assert [schedule.lr(1.0, step, flat) for step in (0, 2, 8)] == [0.5, 1 / 16, 1 / 16]
    assert schedule.lr(1.0, 8, flat[:2]) == 1 / 4


def plateaued(clips: Path, folder: Path) -> dict[str, Any]:
    """A run that learns nothing: so high a rate that the loss rises."""
    values = recipe(clips, folder)
    values["schedule"] |= {"decay": "plateau", "patience": 2, "warmup_steps": 0}
    values["logging"] |= {"validate_every": 1, "every": 1, "checkpoint_every": 2, "keep": 9}
    values["optimizer"]["lr"] = 5.0
    return values


def test_a_resumed_run_cuts_as_one_that_was_not(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of validations is in the checkpoint: counted from the resume alone, the second cut would come later."""
    whole, stopped = plateaued(clips, tmp_path / "whole"), plateaued(clips, tmp_path / "stopped")
    assert start(whole, tmp_path) == 0
    with monkeypatch.context() as patch:
        stop_in_step(patch, 4)
        assert start(stopped, tmp_path) == 128 + signal.SIGTERM
    assert start(stopped, tmp_path) == 0
    rates = [row["lr"] for row in read_metrics(tmp_path / "whole/run") if "lr" in row]
    assert rates == [5.0, 5.0, 2.5, 2.5, 1.25, 1.25]
    a, b = states(tmp_path / "whole/run", whole), states(tmp_path / "stopped/run", stopped)
    assert all(torch.equal(a[name], b[name]) for name in a)
    notes = [read_manifest(tmp_path / run / "run" / FOLDER / "step-00000006").note for run in ("whole", "stopped")]
    assert notes[0][VALIDATIONS] == notes[1][VALIDATIONS] and [row[0] for row in notes[0][VALIDATIONS]] == [*range(7)]


@pytest.mark.parametrize("without", [{"logging": {"validate_every": 0}}, {"data": {"validation_share": 0.0}}])
def test_a_plateau_without_validation_is_refused(
    values: dict[str, Any], tmp_path: Path, without: dict[str, dict[str, Any]]
) -> None:
    values["schedule"]["decay"] = "plateau"
    for section, keys in without.items():
        values[section] |= keys
    assert "schedule.decay is plateau, with logging.validate_every(" in refusal(values, tmp_path)


def test_a_plateau_without_windows_is_refused(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only the clips can tell."""
    values["schedule"]["decay"] = "plateau"
    values["data"]["frames"] = 12  # of scenes of 20 and 12
    assert "no scene is long enough for held-out windows" in failure(values, tmp_path, capsys)
