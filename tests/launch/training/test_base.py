"""Runs of low-rank factors on another run's weights: what they change, stopped and gone on with, what is refused."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import plain_states
from training import recipe, start, states, stop_in_step

from cinemesh.errors import CinemeshError
from cinemesh.launch.exchange.merging import merge
from cinemesh.launch.training.checkpoint.choosing import FOLDER
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.telemetry import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")
LORA = {"rank": 3, "alpha": 6, "targets": ["q", "cross.kv", "down"]}


def base(clips: Path, folder: Path, seed: int = 0) -> Path:
    """A run of whole weights; its last checkpoint."""
    folder.mkdir()
    values = recipe(clips, folder) | {"seed": seed}
    assert start(values, folder) == 0
    return folder / "run" / FOLDER / "step-00000006"


def factors(clips: Path, folder: Path, below: Path, lora: dict[str, Any] = LORA) -> dict[str, Any]:
    """The recipe of a run of factors on it."""
    folder.mkdir(exist_ok=True)
    values = recipe(clips, folder)
    values["model"] |= {"lora": dict(lora)}
    values["data"]["cache"] = str(below.parents[2] / "cache")
    return values | {"start_from": {"checkpoint": str(below)}}


def validations(folder: Path) -> list[float]:
    return [row["validation_loss"] for row in read_metrics(folder / "run") if "validation_loss" in row]


def test_a_run_of_factors_begins_as_the_base_learns_and_goes_on_to_the_same_bits(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = base(clips, tmp_path / "base")
    whole, stopped = (factors(clips, tmp_path / name, below) for name in ("whole", "stopped"))
    assert start(whole, tmp_path / "whole") == 0
    found = validations(tmp_path / "whole")
    # Step 0 is the base, since B is zeros; then what the factors add is learnt.
    assert math.isclose(found[0], validations(tmp_path / "base")[-1], rel_tol=1e-6)
    assert found[-1] < found[0]
    manifest = read_manifest(tmp_path / "whole" / "run" / FOLDER / "step-00000006")
    assert manifest.model["lora"] == LORA | {"alpha": 6.0}
    assert {name.split(".", 2)[2] for name in manifest.layout.shapes} == {
        f"lora_{factor}.{name}" for factor in "AB" for name in ("q", "cross_kv", "down")
    }
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert start(stopped, tmp_path / "stopped") == 128 + signal.SIGTERM
    assert start(stopped, tmp_path / "stopped") == 0
    one, other = (states(tmp_path / name / "run", whole) for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("other", [{"rank": 2}, {"alpha": 60}, {"targets": ["q"]}], ids=["rank", "alpha", "targets"])
def test_each_of_its_keys_is_obeyed(clips: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    below = base(clips, tmp_path / "base")
    ends: list[dict[str, torch.Tensor]] = []
    for name, lora in (("one", LORA), ("other", LORA | other)):
        assert start(factors(clips, tmp_path / name, below, lora), tmp_path / name) == 0
        end = tmp_path / name / "run" / FOLDER / "step-00000006"
        merge(end, tmp_path / f"{name}-merged", None)
        ends.append(plain_states(tmp_path / f"{name}-merged")["master"])
    assert not torch.equal(ends[0]["blocks.0.q"], ends[1]["blocks.0.q"])
    untouched = plain_states(below)["ema"]  # what has no factors is the base's
    assert torch.equal(ends[0]["blocks.0.gate"], untouched["blocks.0.gate"])
    assert torch.equal(ends[0]["final.weight"], untouched["final.weight"])


def test_gone_on_with_on_another_base_it_is_refused(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below, other = base(clips, tmp_path / "base"), base(clips, tmp_path / "other", 3)
    values = factors(clips, tmp_path / "run", below)
    values["logging"]["checkpoint_every"] = 3
    assert start(values, tmp_path / "run", "schedule.steps=3", "schedule.warmup_steps=1") == 0
    capsys.readouterr()
    values["start_from"]["checkpoint"] = str(other)
    values["may_change"] = ["start_from"]
    assert start(values, tmp_path / "run") != 0
    assert "these low-rank factors are of another base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"start_from": None}, "model.lora without start_from"),
        ({"start_from": {"checkpoint": "x", "moments": "keep"}}, "model.lora with start_from.moments: keep"),
        ({"start_from": {"checkpoint": "x", "positions": "expand"}}, "model.lora with start_from.positions: expand"),
        ({"lora": {"rank": 0, "alpha": 1}}, "model.lora.rank is 0"),
        ({"lora": {"rank": 2, "alpha": 0}}, "model.lora.alpha is 0"),
        ({"lora": {"rank": 2}}, "the key 'model.lora.alpha' is missing"),
        ({"lora": {"rank": 2, "alpha": 1, "target": ["q"]}}, "unknown key 'model.lora.target'"),
        ({"lora": {"rank": 2, "alpha": 1, "targets": ["kq"]}}, "lora: targets name 'kq'"),
        ({"lora": 3}, "model.lora is 3"),
    ],
)
def test_a_recipe_of_factors_that_cannot_be(clips: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    values = factors(clips, tmp_path, tmp_path / "a" / "b" / "c" / "d")
    if "lora" in changed:
        values["model"]["lora"] = changed["lora"]
    else:
        values |= changed
    with pytest.raises(CinemeshError, match=said.replace(".", r"\.")):
        check_config(values, "test")
