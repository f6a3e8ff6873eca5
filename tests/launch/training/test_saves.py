"""Checkpoints of a run: what it tells of them, and what it does when they fail or are damaged."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training import STATES, in_two_batches, start, states

from cinemesh.launch.cluster import processes
from cinemesh.launch.training.checkpoint import saving
from cinemesh.launch.training.checkpoint.choosing import VALIDATION_LOSS, latest
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.steps import SAMPLES
from cinemesh.launch.training.telemetry import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")


def fail_saves(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Nothing can be written at these steps."""
    write = saving.write_part

    def failing(path: Path, *given: Any) -> Any:
        if int(path.parent.name.split("-")[1].split(".")[0]) in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *given)

    monkeypatch.setattr(saving, "write_part", failing)


def test_a_save_that_fails_is_told_and_does_not_end_the_run(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written_at_once: None,
) -> None:
    """Two in a row, one that succeeds, two in a row: never three. The last state is saved."""
    values["logging"]["checkpoint_every"] = 1
    fail_saves(monkeypatch, {1, 2, 4, 5})
    assert start(values, tmp_path) == 0
    out = capsys.readouterr().out
    warned = [line for line in out.splitlines() if line.startswith("WARNING: cannot write checkpoint")]
    assert [re.findall(r"step-0*(\d)", line)[0] for line in warned] == ["1", "2", "4", "5"]
    assert all("No space left on device" in line and "free some space" in line for line in warned)
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]


def test_three_failed_saves_in_a_row_end_the_run(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written_at_once: None,
) -> None:
    """What it would lose by going on grows: one message, and the checkpoint before them is there."""
    values["logging"]["checkpoint_every"] = 1
    fail_saves(monkeypatch, {2, 3, 4})
    assert start(values, tmp_path) == processes.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000004" in line and "That was checkpoint 3 in a row; free some space" in line
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("every", [0, 6])
def test_the_last_save_must_succeed(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    every: int,
) -> None:
    """A run that ended well without what it learnt would be a lie."""
    values["logging"]["checkpoint_every"] = every
    fail_saves(monkeypatch, {6})
    assert start(values, tmp_path) == processes.USER_ERROR
    assert "cannot write checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_told(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the one before, to the bits of one that was not disturbed."""
    values["logging"]["checkpoint_every"] = 2
    assert start(values, tmp_path) == 0
    want = states(tmp_path / "run", values)
    (file,) = (tmp_path / "run/checkpoints/step-00000006").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    capsys.readouterr()
    assert start(values, tmp_path) == 0
    out = capsys.readouterr().out
    assert "resumed from" in out and "step-00000004" in out.splitlines()[0]
    assert "WARNING: checkpoint" in out and "00000.safetensors is not what was written, in block 0 of ema" in out
    got = states(tmp_path / "run", values)
    assert all(torch.equal(got[name], want[name]) for name in STATES)


def test_a_checkpoint_tells_where_the_data_are(values: dict[str, Any], tmp_path: Path) -> None:
    """Samples taken of each bucket's stream, and the validation loss of its step."""
    values = in_two_batches(values)
    assert start(values, tmp_path) == 0
    newest = latest(tmp_path / "run/checkpoints")
    assert newest is not None
    note = read_manifest(newest).note
    assert note[SAMPLES] == [2 * 2, 4 * 4], "steps take buckets 1, 0, 0, 1, 1, 1"
    losses = [row["validation_loss"] for row in read_metrics(tmp_path / "run") if "validation_loss" in row]
    assert note[VALIDATION_LOSS] == pytest.approx(losses[-1], rel=1e-6)
