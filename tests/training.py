"""Runs of a tiny model for tests: their clip, their recipe, and what they say when they fail."""

import os
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cinemesh.data.clips import write_mp4
from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster import processes
from cinemesh.launch.storage.places import Location
from cinemesh.launch.training import loop as train
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest
from cinemesh.launch.training.checkpoint.loading import load
from cinemesh.launch.training.checkpoint.manifest import COUNTERS, SAVED_STATES
from cinemesh.launch.training.checkpoint.saving import Saver
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.runner import StepRunner

CAPTIONS = """
- {name: left, file: a.mp4, first_frame: 0, last_frame: 19, caption: "It moves."}
- {name: right, file: a.mp4, first_frame: 20, last_frame: 31, caption: "It waits."}
"""
RATE = Fraction(24000, 1001)  # frames/s of their clip
STATES = (*SAVED_STATES, COUNTERS)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's environment, and the threads as they were: a run sets them for itself."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which a checkpoint is written before the next step asks whether it is."""
    begin = Saver.begin

    def waits(self: Saver, note: dict[str, Any]) -> None:
        begin(self, note)
        if self.begun is not None:
            self.begun.written.exception()

    monkeypatch.setattr(Saver, "begin", waits)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


def write_clips(folder: Path) -> None:
    """A clip of 32 frames of 32x32 pixels that no two frames of share, and its captions."""
    t, y, x = torch.meshgrid(torch.arange(32), torch.arange(32), torch.arange(32), indexing="ij")
    frames = torch.stack([(7 * t + 3 * x) % 256, (5 * y + 2 * t) % 256, (x + y) * 4 % 256], -1).to(torch.uint8)
    write_mp4(folder / "a.mp4", frames, RATE)
    (folder / "captions.yaml").write_text(CAPTIONS)


def recipe(clips: Path, out: Path, **plan: Any) -> dict[str, Any]:
    """6 steps of a tiny model: 4 tokens a sample, 2 samples a step."""
    return {
        "model": {"preset": "tiny"},
        "plan": {"dtype": "float32", "recompute": "none", **plan},
        "device": "cpu",
        "data": {
            "clips": [str(clips / "a.mp4")],
            "captions": str(clips / "captions.yaml"),
            "cache": str(out / "cache"),
            "size": 32,
            "frames": 8,
            "fps": 24,
            "encoders": [{"name": "bytes", "width": 12, "tokens": 17}],
            "global_batch": 2,
        },
        "optimizer": {"lr": 1e-2, "ema_decay": 0.5},
        "schedule": {"steps": 6, "warmup_steps": 2},
        "logging": {"directory": str(out / "run"), "every": 2, "validate_every": 3, "checkpoint_every": 0},
    }


def in_two_buckets(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a second bucket of 8 tokens, twice as often; its steps take buckets 1, 0, 0, 1, 1, 1."""
    data = {**values["data"], "buckets": [{}, {"width": 64, "weight": 2}]}
    return {**values, "data": data, "seed": 11}


def in_two_batches(values: dict[str, Any]) -> dict[str, Any]:
    """The two buckets, each with its own samples of a step: 2 of 4 tokens, 4 of 8."""
    values = in_two_buckets(values)
    values["data"]["buckets"][1]["global_batch"] = 4
    return values


@pytest.fixture
def values(clips: Path, tmp_path: Path) -> dict[str, Any]:
    return recipe(clips, tmp_path)


def start(values: dict[str, Any], tmp_path: Path, *overrides: str, nproc: int | None = None) -> int:
    """``cinemesh train`` in this process; its exit code."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        train.run(config=path, nproc=nproc, overrides=overrides)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def refusal(values: dict[str, Any], tmp_path: Path, *overrides: str, nproc: int | None = None) -> str:
    """The message of a run that is refused before it starts, and that left nothing behind."""
    with pytest.raises(CinemeshError) as caught:
        start(values, tmp_path, *overrides, nproc=nproc)
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml", "captions.yaml"}
    return str(caught.value)


def failure(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run which failed on its way wrote to stderr."""
    assert start(values, tmp_path) == processes.USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".partial"))]
    return lines[0]


def states(run: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, moments, EMA and counters of a run's newest checkpoint, whatever plan wrote it."""
    newest = latest(run / FOLDER)
    assert newest is not None
    return states_in(newest, values)


def states_in(checkpoint: Location, values: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, moments, EMA and counters, whatever plan wrote them. Raises CinemeshError where they are damaged."""
    setting = Setting.of(check_config({**values, "plan": {"dtype": "float32"}}, "test"))
    runner = StepRunner(setting.model, setting.config.plan, setting.batches[0], setting.config.optimizer, None)
    load(checkpoint, runner)
    return {name: runner.buffers[name].clone() for name in STATES}


def cinemesh(*args: object) -> list[str]:
    return [sys.executable, "-m", "cinemesh.launch.cli", *map(str, args)]


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM arrives while step ``number`` (from 1) is running."""
    step = StepRunner.step

    def interrupted(self: StepRunner, lr: float, *given: Any, **how: Any) -> None:
        if self.steps_done == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, lr, *given, **how)

    monkeypatch.setattr(StepRunner, "step", interrupted)
