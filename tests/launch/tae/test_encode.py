"""``cinemesh tae encode``: the latents that a transformer's recipe trains on with this autoencoder, by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from training import recipe
from typer.testing import CliRunner

from cinemesh.data.encoding import codec_of
from cinemesh.launch.cli import app
from cinemesh.launch.cluster.processes import Joined
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.tae.building import build
from cinemesh.model.tae.config import tae_preset
from cinemesh.model.tae.files import write

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A tiny one with random weights, whose latents are far from standardised."""
    config = tae_preset("tiny")
    net = build(config)
    net.initialise(3)
    write(tmp_path / "tae", net, torch.full((config.channels,), 0.25), torch.full((config.channels,), 2.0), {})
    return tmp_path / "tae"


@pytest.fixture
def values(clips: Path, tmp_path: Path, autoencoder: Path) -> dict[str, Any]:
    values = recipe(clips, tmp_path)
    return values | {"codec": {"kind": "tae", "path": str(autoencoder), "device": "cpu"}}


def encode(values: dict[str, Any], tmp_path: Path, *words: str | Path) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    directory, *others = words
    return CliRunner().invoke(app, ["tae", "encode", str(directory), str(path), *map(str, others)])


def test_what_is_encoded_is_what_is_trained_on(values: dict[str, Any], autoencoder: Path, tmp_path: Path) -> None:
    """Every window of the cache that a run with this codec makes, bit by bit; each is decoded, as long as it was."""
    out, decoded = tmp_path / "latents.safetensors", tmp_path / "clips"
    done = encode(values, tmp_path, autoencoder, "--out", out, "--decoded", decoded, "--device", "cpu")
    assert done.exit_code == 0, done.output
    setting = Setting.of(check_config(values, "test"))
    (windows,) = open_history(setting, Joined(0, "cpu", None)).at(0).buckets
    samples = [of[index] for of in (windows.train, windows.validation) for index in range(len(of))]
    expected = {f"{one.scene}.{windows.bucket}.{one.first_frame}": one.latent for one in samples}
    with safe_open(str(out), "pt") as file:
        assert file.metadata() == {"latents": codec_of(str(autoencoder)).build().fingerprint}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    assert found.keys() == expected.keys() and len(found) == 7
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(path.stem for path in decoded.iterdir()) == sorted(expected)
    assert len({tuple(value.flatten().tolist()) for value in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, ("nowhere", "--out", "latents.safetensors"), "nowhere"),
        ({"size": 36}, (None, "--out", "latents.safetensors"), "36"),
    ],
)
def test_what_cannot_be_encoded_is_told(
    values: dict[str, Any], autoencoder: Path, tmp_path: Path, change: dict[str, Any], words: Any, said: str
) -> None:
    values["data"] |= change
    directory, *others = words
    out = [tmp_path / word if word.endswith(".safetensors") else word for word in others]
    done = encode(values, tmp_path, directory or autoencoder, *out)
    assert done.exit_code != 0 and not (tmp_path / "latents.safetensors").exists()
    assert said in str(done.exception) + done.output
