"""The recipes of the ablations: the paper's numbers, arms that differ in their one thing, and dry runs that fit.

Only this sees an arm that changes two things at once, or a second stage that begins with another arm's first.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cinemesh.data.scenes import read_captions
from cinemesh.data.settings import CAPTIONS
from cinemesh.launch.cli import app
from cinemesh.launch.proof.lint import lint_program
from cinemesh.launch.training.checkpoint.choosing import FOLDER
from cinemesh.launch.training.checkpoint.manifest import step_folder
from cinemesh.launch.training.recipe import read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.config import trained
from cinemesh.model.step import build_step

FOLDER_OF = Path(__file__).parents[3] / "configs" / "ablation"
ARMS = {"flow": "1-flow", "v-prediction": "1-v-prediction", "dit": "1-dit", "image-captions": "1-flow"}
RECIPES = [*dict.fromkeys(ARMS.values()), *(f"2-{arm}" for arm in ARMS)]
DIFFERS = {  # from the baseline's recipe of the stage, besides where it lies
    "1-flow": {},
    "2-flow": {},
    "1-v-prediction": {"model.objective": "v-prediction"},
    "2-v-prediction": {"model.objective": "v-prediction"},
    "1-dit": {"model.block": "dit", "model.ffn": 12288},
    "2-dit": {"model.block": "dit", "model.ffn": 12288},
    "2-image-captions": {"data.captions": "configs/ablation/image-captions.yaml"},
}


def path_of(name: str) -> Path:
    return FOLDER_OF / f"{name}.yaml"


@cache
def setting_of(name: str) -> Setting:
    return Setting.of(read_config(path_of(name)))


def keys_of(name: str) -> dict[str, object]:
    """Of the file, but for where the run and what it begins with lie."""
    values = yaml.safe_load(path_of(name).read_text())
    sections = {section: of for section, of in values.items() if isinstance(of, dict)}
    keys = {f"{section}.{key}": value for section, of in sections.items() for key, value in of.items()}
    where = ("logging.directory", "data.cache", "start_from.checkpoint")
    return {key: value for key, value in keys.items() if key not in where}


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_the_papers(name: str) -> None:
    """3.6.2: 352 x 192 px, 4 to 8 s, 96K steps of 9,216 images on 512 GPUs; 100K of 4,096 images or 256 clips."""
    setting = setting_of(name)
    config, data = setting.config, setting.config.data
    assert config.plan.world_size == 512 and config.schedule.decay == "constant"
    assert {(bucket.height, bucket.width) for bucket in data.shapes} == {(192, 352)}
    if name.startswith("1"):
        assert (config.schedule.steps, config.optimizer.lr, data.global_batches) == (96_000, 3e-4, [9216])
        assert setting.latents == [(1, 24, 44)]
        return
    assert (config.schedule.steps, config.optimizer.lr, data.global_batches) == (100_000, 5e-5, [256, 4096])
    assert setting.latents == [(16, 24, 44), (1, 24, 44)] and setting.model.tokens((16, 24, 44)) == 4224
    video, images = data.shapes
    assert images.weight / video.weight == 0.02 and video.squeeze_from_s == 4 and video.frames / 16 == 8
    begun = config.start_from
    assert begun is not None and begun.positions == "expand"
    before = setting_of(ARMS[name[2:]])
    assert begun.checkpoint == step_folder(before.config.logging.directory / FOLDER, 96_000)
    assert (before.model.objective, before.model.block) == (setting.model.objective, setting.model.block)


@pytest.mark.parametrize("name", RECIPES)
def test_an_arm_differs_in_its_one_thing(name: str) -> None:
    own, baseline = keys_of(name), keys_of(f"{name[0]}-flow")
    assert {key: value for key, value in own.items() if baseline.get(key) != value} == DIFFERS[name]
    assert baseline.keys() <= own.keys()


def test_arms_have_as_many_weights() -> None:
    """But for biases and gains: 0.03 %."""
    counts = [sum(row.elements for row in trained(setting_of(name).model)) for name in ("2-flow", "2-dit")]
    assert abs(counts[1] / counts[0] - 1) < 3e-4 and 4.7e9 < counts[0] < 5.2e9


@pytest.mark.parametrize("name", RECIPES)
def test_it_would_start_and_its_step_may_be_captured(name: str) -> None:
    setting = setting_of(name)
    setting.check_training()
    built = build_step(replace(setting.model, layers=2), setting.config.plan, setting.batches[0])
    assert lint_program(built) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_fits(name: str) -> None:
    done = CliRunner().invoke(app, ["train", str(path_of(name)), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ranks"] == 512 and said["peak_bytes"] < said["limit_bytes"]


def test_image_captions_tell_the_same_scenes() -> None:
    """Every scene, of as many frames, in as many tokens; what happens is what they leave out."""
    video, images = (
        {scene.name: scene for scene in read_captions(path)} for path in (CAPTIONS, FOLDER_OF / "image-captions.yaml")
    )
    assert video.keys() == images.keys()
    for name, scene in images.items():
        other = video[name]
        assert (scene.file, scene.first_frame, scene.last_frame) == (other.file, other.first_frame, other.last_frame)
        assert scene.caption != other.caption and len(scene.caption.encode()) <= 64
        assert scene.caption.count(".") == 3, "first, middle and last frame"
