"""A model by file: any field of the configuration, read strictly, taken wherever a model is named."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.models import read_model
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.config import PRESETS, USUAL_LATENTS, LatentCondition, ModelConfig
from cinemesh.parallel.ir.plan import Plan

LONG = "preset: movie-gen-30b\nposition_lengths: [128, 68, 120]\nlatent: 128x136x240\n"
ABLATION = "preset: movie-gen-5b\nlayers: 24\nffn: 12288\n"
UPSAMPLER = """
layers: 26
width: 4096
heads: 32
ffn: 11008
position_lengths: [14, 68, 120]
encoders:
  - {name: ul2, width: 4096, tokens: 512}
  - {name: metaclip, width: 1280, tokens: 256}
  - {name: byt5, width: 1472, tokens: 100}
latent_conditions:
  - {name: low_resolution, channels: 16}
latent: 14x136x240
"""


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_can_say_every_field_of_every_preset(name: str, tmp_path: Path) -> None:
    """JSON is YAML: a field that no file can give, a variant's too, would differ."""
    config = PRESETS[name]
    found = read_model(written(tmp_path / "model.yaml", json.dumps(asdict(config))))
    assert found.config == config and found.usual_latent is None
    assert {field.name for field in fields(ModelConfig)} == asdict(config).keys()


def test_a_file_changes_a_preset_and_keeps_its_usual_latent_where_it_has_the_positions(tmp_path: Path) -> None:
    ablation = read_model(written(tmp_path / "ablation.yaml", ABLATION))
    assert (ablation.config.name, ablation.config.layers, ablation.config.ffn) == ("ablation", 24, 12288)
    assert ablation.config.width == PRESETS["movie-gen-5b"].width and ablation.latent() == (16, 24, 44)
    long = read_model(written(tmp_path / "long.yaml", LONG))
    assert long.config.tokens(long.latent()) == 1_044_480
    upsampler = read_model(written(tmp_path / "up.yaml", UPSAMPLER))
    assert upsampler.config.latent_conditions == (LatentCondition("low_resolution", 16),)
    short = read_model(written(tmp_path / "short.yaml", "preset: movie-gen-30b\nposition_lengths: [8, 96, 96]\n"))
    assert short.latent("8x16x16") == (8, 16, 16)
    with pytest.raises(CinemeshError, match="says no usual latent; give --latent"):
        short.latent()
    assert read_model("tiny").latent() == USUAL_LATENTS["tiny"]


@pytest.mark.parametrize(
    ("text", "latent", "tokens"),
    [(LONG, None, "1,044,480"), (ABLATION, None, "4,224"), (UPSAMPLER, None, "114,240"),
     ("preset: movie-gen-30b", "1x128x128", "4,096")],
    ids=["1 M tokens", "5B ablation", "7B upsampler", "1,024 px image"],
)  # fmt: skip
def test_they_plan(text: str, latent: str | None, tokens: str, tmp_path: Path) -> None:
    asked = ["plan", "--gpus=64", "--top=1", "--model", written(tmp_path / "model.yaml", text)]
    done = CliRunner().invoke(app, [*asked, *(["--latent", latent] if latent else [])])
    assert done.exit_code == 0, done.exception
    assert f"({tokens} tokens)" in done.stdout and "\n1 " in done.stdout


def test_every_command_that_names_a_model_takes_a_file(tmp_path: Path) -> None:
    """Of those that start processes, what they prove the plan on."""
    small = "preset: tiny\nlayers: 3\nlatent: 3x4x12\n"
    model = written(tmp_path / "three.yaml", small)
    for command in (
        ["model", model],
        ["program", "--model", model, "--plan", "tp=2"],
        ["kernels", "--model", model, "--device", "cpu"],
        ["explain", "dp_shard=2", "--model", model],
        ["compare", "dp_shard=2", "tp=2", "--model", model],
        ["plan", "--gpus", "2", "--model", model, "--top", "1"],
    ):
        done = CliRunner().invoke(app, [*command, "--json"])
        assert done.exit_code == 0, (command, done.exception)
        values: Any = json.loads(done.stdout)
        assert values.get("model", model) == model
        if command[0] == "program":
            assert {op["place"]["block"] for op in values["records"]} == {None, 0, 1, 2}
    case = small_case(Plan(tp=2), model)
    assert case.config.layers == 2 and "3 layers of 48 -> 2" in " ".join(case.remarks)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("preset: tinny", "did you mean 'tiny'"),
        ("preset: [tiny]", r"preset is \['tiny'\]"),
        ("layrs: 3", "did you mean 'layers'"),
        ("layers: 3", "has no width, heads, ffn, encoders"),
        ("preset: tiny\nlayers: 2.5", r"layers is 2\.5; it must be a whole number"),
        ("preset: tiny\nlayers: true", "layers is True"),
        ("preset: tiny\nnorm_eps: 0", "norm_eps is 0; it must be a positive number"),
        ("preset: tiny\npatch: [1, 2]", "a list of 3"),
        ("preset: tiny\nencoders: [{name: a, width: 4}]", r"encoders\[0\] has no tokens"),
        ("preset: tiny\nencoders: [{name: a, width: 4, tokens: 2, layers: 3}]", "unknown key 'layers'"),
        ("preset: tiny\nwidth: 49", r"width\(49\) % heads\(6\)"),
        ("preset: tiny\nlatent: 7x4x12", "7 positions, but the table of model bad has 6"),
        ("preset: tiny\nlatent: [3, 4, 12]", "is not TxHxW"),
        ("", "holds no mapping"),
    ],
)
def test_what_is_no_model_is_one_message(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=told) as error:
        read_model(written(tmp_path / "bad.yaml", text))
    assert "\n" not in str(error.value)


def test_an_unknown_name_says_that_files_are_taken() -> None:
    with pytest.raises(CinemeshError, match=r"did you mean 'movie-gen-30b'\?.*Or give a \.yaml file"):
        read_model("movie-gen-3b")
