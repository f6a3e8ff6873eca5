"""The recipe: what is read, what is refused, and the learning rate."""

import math
from dataclasses import fields
from pathlib import Path

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.training.recipe import (
    Config,
    DataSection,
    OptimizerSection,
    SampleSection,
    ScheduleSection,
    read_config,
)
from cinemesh.launch.training.setting import Setting
from cinemesh.model.config import Encoder, preset
from cinemesh.model.step import Optimizer
from cinemesh.parallel.ir.plan import Plan

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
BUCKETS = QUICKSTART.with_name("buckets.yaml")
RECIPE = """
model: {preset: tiny-video, layers: 2}
plan: {tp: 2, dtype: float32, recompute: none}
data: {cache: cache, global_batch: 8, size: 64, frames: 9}
optimizer: {lr: 2e-3, ema_decay: 0.9}
schedule: {steps: 10}
logging: {directory: run}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(CinemeshError) as caught:
        read_config(recipe, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_sections_become_what_the_run_uses(recipe: Path) -> None:
    """Defaults are those of the classes that are filled: a second set of them would drift."""
    config = read_config(recipe)
    assert config.plan == Plan(tp=2, dtype="float32", recompute="none")
    assert config.optimizer == OptimizerSection(lr=2e-3, ema_decay=0.9)  # 2e-3 is a string to YAML 1.1
    for field in fields(Optimizer):
        if field.name != "ema_decay":
            assert getattr(config.optimizer, field.name) == getattr(Optimizer(), field.name)
    setting = Setting.of(config)
    model, codec = setting.model, setting.encoding.codec
    assert (model.layers, model.width, model.channels) == (2, preset("tiny-video").width, 16)
    assert model.encoders == (Encoder("bytes", 64, 64),)  # the data's, not the preset's
    (bucket,) = config.data.shapes
    assert str(bucket) == "9x64x64" and bucket.latent(codec) == (2, 8, 8)  # 9 frames fill two blocks of 8
    assert config.sampled == bucket


def test_the_shipped_recipe_is_whole() -> None:
    config = read_config(QUICKSTART)
    assert config.plan.world_size == 2 and config.sample is not None and config.sample.scenes is None


def test_the_shipped_recipe_of_several_buckets_fits_its_clips_and_its_plan() -> None:
    """What a bucket leaves out is the data's own; every scene fills a bucket and every bucket has a scene."""
    setting = Setting.of(read_config(BUCKETS))
    data = setting.config.data
    assert [(str(bucket), bucket.weight) for bucket in data.shapes] == [
        ("16x128x128", 2),
        ("8x128x128", 1),
        ("16x96x160", 1),
    ]
    assert [batch.latent for batch in setting.batches] == [(2, 16, 16), (1, 16, 16), (2, 12, 20)]
    assert {batch.samples for batch in setting.batches} == {4}
    assert setting.config.sampled == data.shapes[2]


def test_overrides_replace_one_value_each(recipe: Path) -> None:
    config = read_config(recipe, ["plan.tp=1", "plan.cp=3", "optimizer.lr=1e-4", "data.clips=[a, b]", "sample.steps=7"])
    assert (config.plan.tp, config.plan.cp, config.plan.dtype) == (1, 3, "float32")
    assert config.optimizer.lr == 1e-4 and config.optimizer.ema_decay == 0.9
    assert config.data.clips == ("a", "b")
    assert config.sample is not None and config.sample.steps == 7  # a section that the file lacks


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("optmizer.lr=1", "unknown key 'optmizer'; did you mean 'optimizer'?"),
        ("plan.tpp=2", "unknown key 'tpp'; did you mean 'tp'?"),
        ("data.encoders=[{name: a, widht: 3}]", "unknown key 'data.encoders.0.widht'; did you mean 'width'?"),
        ("sample.guidnce=2", "unknown key 'sample.guidnce'; did you mean 'guidance'?"),
        (
            "codec.kind=block-dtc",
            "codec.kind is 'block-dtc'; did you mean 'block-dct'? Known: block-dct, dct-context, frame-dct, diffusers",
        ),
        ("codec.path=x", "unknown key 'codec.path'; known: kind"),
        ("codec.kind={a: b}", "codec.kind is {'a': 'b'}; known: block-dct, dct-context, frame-dct, diffusers"),
        ("codec.kind=[block-dct]", "codec.kind is ['block-dct']; did you mean"),
        ("codec=block-dct", "codec is 'block-dct': input should be a dictionary"),
        ("zzz=1", "unknown key 'zzz'; known: model, plan, codec"),
        ("schedule.steps=many", "schedule.steps is 'many'; it must be a whole number, 1 to 10,000,000"),
        ("schedule.steps=0", "schedule.steps is 0; it must be 1 to 10,000,000: a run draws the buckets"),
        ("optimizer.lr=.nan", "optimizer.lr is '.nan'; it must be a number, 1e-12 to 10"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay is 1; it must be 0 to 0.99999994"),
        ("caption_dropout=1.5", "caption_dropout is 1.5; it must be 0 to 0.99"),
        ("data.stride=0", "data.stride is 0; it must be 1 to 10,000"),
        ("schedule.warmup_steps=11", "schedule: warmup_steps(11) > steps(10); the learning rate would never"),
        ("optimizer.weight_decay=500", "lr(0.002) * weight_decay(500) = 1; it must be below 1"),
        ("plan.tp=0", "tp is 0; it must be a whole number of at least 1"),
        ("plan.tp=1:30", "tp is '1:30'; it must be a whole number"),
        ("plan.tp=010", "tp is '010'; it must be a whole number"),
        ("plan.prefetch=off", "prefetch is 'off'; it must be a whole number of at least 0"),
        ("plan=fast", "plan: 'fast' is not key=value"),
        ("schedule.decay=cosin", "schedule.decay is 'cosin': input should be 'cosine', 'constant' or 'plateau'"),
        ("schedule", "--set 'schedule' is not KEY=VALUE"),
        ("model.preset.name=x", "preset is 'tiny-video', no section"),
        ("data.clips=[a", "'[a' is not valid YAML: while parsing a flow sequence"),
    ],
)
def test_a_mistake_is_named_with_its_key_value_and_rule(recipe: Path, override: str, expected: str) -> None:
    assert expected in message(recipe, override)


def test_a_missing_key_a_missing_section_and_a_key_given_twice(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("steps: 10", ""))
    assert "the key 'schedule.steps' is missing" in message(recipe)
    recipe.write_text(RECIPE.replace("schedule: {steps: 10}", ""))
    assert "the key 'schedule' is missing" in message(recipe)
    recipe.write_text(RECIPE + "schedule: {steps: 20}\n")  # PyYAML alone takes the last in silence
    assert "key 'schedule' is given twice" in message(recipe) and "line 8" in message(recipe)
    recipe.write_text(RECIPE.replace("{steps: 10}", "{steps: 10, steps: 20}"))
    assert "key 'steps' is given twice" in message(recipe)


def test_a_file_that_is_no_recipe(recipe: Path, tmp_path: Path) -> None:
    assert "cannot read the recipe" in message(tmp_path / "absent.yaml")
    recipe.write_text("- a\n- b\n")
    assert "holds no mapping" in message(recipe)
    recipe.write_text("model: [1\n")
    assert "is not valid YAML" in message(recipe)
    recipe.write_bytes(b"\xff\xfe\x00")
    assert "cannot read the recipe" in message(recipe)


def test_unknown_preset_and_model_overrides_are_refused_when_the_model_is_built(recipe: Path) -> None:
    def build(*overrides: str) -> Setting:
        return Setting.of(read_config(recipe, overrides))

    with pytest.raises(CinemeshError, match="did you mean 'tiny-video'"):
        build("model.preset=tiny-vidoe")
    with pytest.raises(CinemeshError, match=r"width\(192\) % heads\(5\) = 2"):
        build("model.heads=5")


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    cosine = ScheduleSection(steps=10, warmup_steps=2, final_share=0.1)
    assert [cosine.lr(1.0, step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine.lr(1.0, 6) == pytest.approx(0.1 + 0.9 * 0.5)  # half way
    assert cosine.lr(1.0, 9) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    constant = ScheduleSection(steps=10, warmup_steps=4, decay="constant")
    assert [constant.lr(2.0, step) for step in (0, 3, 4, 9)] == [0.5, 2.0, 2.0, 2.0]


def test_sections_are_frozen(recipe: Path) -> None:
    config = read_config(recipe)
    assert isinstance(config, Config) and isinstance(config.data, DataSection)
    with pytest.raises(AttributeError):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "1:30", "010", "1_000", ".nan", "true"])
def test_a_word_that_yaml_1_1_would_read_is_the_word_or_refused(recipe: Path, word: str) -> None:
    """``capture: off`` is how the guide says it; in every other place too, a number is a number and a text a text."""
    recipe.write_text(RECIPE + f"capture: {word}\n")
    if word == "off":
        assert read_config(recipe).capture == "off"
    else:
        assert "capture is" in message(recipe)
    recipe.write_text(f"{RECIPE}sample: {{scenes: [{word}]}}\n")
    if word != "true":
        assert read_config(recipe).sample == SampleSection(scenes=(word,))
    for key in ("schedule.steps", "optimizer.lr", "seed", "plan.tp"):
        recipe.write_text(RECIPE)
        assert f"{key.removeprefix('plan.')} is" in message(recipe, f"{key}={word}")


def test_a_value_set_twice_is_refused(recipe: Path) -> None:
    assert "seed is given twice" in message(recipe, "seed=1", "optimizer.lr=1", "seed=2")
