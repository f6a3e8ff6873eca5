"""A directory that transformers saved: what of a caption is read, how long, from which files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import minilm, random_clip, random_t5

from cinemesh.data.encoders.directory import HuggingFaceEncoder
from cinemesh.data.encoders.stretch import stretched
from cinemesh.data.text import EncoderSettings, build_encoders
from cinemesh.errors import CinemeshError


@pytest.fixture(scope="module")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("byt5")
    random_t5(directory)
    return directory


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ('FPS-24 A sign reads "GO" and then "home now".', "GO home now"),
        ("A sign reads “GO”.", "GO"),
        ("FPS-24 zoom in. A dog runs.", ""),
        ('An open "quote', ""),
        ('""', ""),
        ("", ""),
    ],
)
def test_what_is_quoted_is_read(byt5: Path, caption: str, text: str) -> None:
    encoder = HuggingFaceEncoder(byt5, 16, reads="quoted")
    assert encoder.text(caption) == text
    states, mask = encoder.encode(caption)
    whole, valid = HuggingFaceEncoder(byt5, 16).encode(text)
    assert torch.equal(states, whole) and torch.equal(mask, valid)
    assert int(mask.sum()) == len(text.encode()) + 1 == encoder.length(caption)


def test_a_caption_without_text_has_one_valid_token(byt5: Path, tmp_path: Path) -> None:
    """The tokenizer's end, or where it adds none, its end all the same; without any it is told before a run."""
    for directory in (byt5, minilm()):
        encoder = HuggingFaceEncoder(directory, 8)
        states, mask = encoder.encode("")
        assert 1 <= int(mask.sum()) <= 2 and states[0].abs().max() > 0
    encoder = HuggingFaceEncoder(minilm(), 8)
    bare = encoder._tokenizer
    encoder._tokenizer = lambda text, **_: {"input_ids": []}  # type: ignore[misc]
    encoder._tokenizer.eos_token_id, encoder._tokenizer.pad_token_id = None, bare.pad_token_id  # type: ignore[attr-defined]
    assert int(encoder.encode("")[1].sum()) == 1
    none = HuggingFaceEncoder(minilm(), 8)
    none._tokenizer = lambda text, **_: {"input_ids": []}  # type: ignore[misc]
    none._tokenizer.eos_token_id = none._tokenizer.pad_token_id = None  # type: ignore[attr-defined]
    with pytest.raises(CinemeshError, match="has no end token"):
        none.place("cpu")


def test_captions_together_are_captions_alone(byt5: Path) -> None:
    """Bit by bit: an embedding is a function of its caption."""
    captions = ["A dog runs.", "", "A cat, and another one, and rain.", "A dog runs."]
    encoder = HuggingFaceEncoder(byt5, 24)
    states, mask = encoder.encode_all(captions)
    for row, caption in enumerate(captions):
        alone, valid = encoder.encode(caption)
        assert torch.equal(states[:, row], alone) and torch.equal(mask[row], valid)
    assert torch.equal(states[:, 0], states[:, 3]) and not torch.equal(states[:, 0], states[:, 2])


def test_a_position_table_is_stretched(tmp_path: Path) -> None:
    """Its first rows stay, the last is the last, and rows between are read off it linearly; a tuned one stays."""
    table = torch.arange(77.0)[:, None] * torch.tensor([1.0, -2.0])
    grown = stretched(table, 256)
    assert grown.shape == (256, 2) and torch.equal(grown[:20], table[:20]) and torch.equal(grown[-1], table[-1])
    assert torch.allclose(grown[20:, 0], torch.linspace(20, 76, 236), atol=1e-5)
    assert torch.equal(stretched(table, 77), table)
    random_clip(tmp_path, positions=40)
    with pytest.raises(CinemeshError, match=r"tokens\(60\) > 40 positions .* or positions to stretched"):
        HuggingFaceEncoder(tmp_path, 60)
    long = HuggingFaceEncoder(tmp_path, 60, positions="stretched")
    own = HuggingFaceEncoder(tmp_path, 40)
    assert torch.equal(long.encode("Twenty bytes.")[0][:14], own.encode("Twenty bytes.")[0][:14])
    beyond = "A caption of more than the forty bytes that it was made for."[:58]
    states, mask = long.encode(beyond)
    assert int(mask.sum()) == 59 and states[:59].isfinite().all() and own.encode(beyond)[1].all()
    assert long.fingerprint != own.fingerprint


def test_bf16_is_near_float32_and_another_fingerprint() -> None:
    whole, half = (HuggingFaceEncoder(minilm(), 16, dtype=d) for d in ("float32", "bfloat16"))
    a, b = (encoder.encode("A big grey rabbit.")[0] for encoder in (whole, half))
    assert 0 < (a - b).abs().max() < 0.1 and b.dtype == torch.float32
    assert 2 * half.layers.bytes == whole.layers.bytes and half.fingerprint != whole.fingerprint


def test_weights_in_several_files_are_one_model(byt5: Path, tmp_path: Path) -> None:
    """As save_pretrained splits a large one; UL2 is such."""
    whole = load_file(byt5 / "model.safetensors")
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((byt5 / name).read_bytes())
    for path in byt5.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    names = sorted(whole)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, tmp_path / file)
    listed = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(listed))
    expected, _ = HuggingFaceEncoder(byt5, 16).encode("A dog.")
    assert torch.equal(HuggingFaceEncoder(tmp_path, 16).encode("A dog.")[0], expected)
    del listed["weight_map"][names[0]]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(listed))
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CinemeshError, match=r"a\.safetensors cannot be read"):
        HuggingFaceEncoder(tmp_path, 16).encode("A dog.")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("pickle", "no pickle is read"),
        ("short", r"cannot be read"),
        ("missing", "its weights have no encoder.block.3.layer.1.DenseReluDense.wo.weight"),
        ("shape", r"is \[24, 41\] in the files and \[24, 40\] in the model"),
        ("list", "lists no weights"),
    ],
)
def test_weights_that_are_not_the_models_are_told(byt5: Path, tmp_path: Path, damage: str, said: str) -> None:
    for path in byt5.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    key = "encoder.block.3.layer.1.DenseReluDense.wo.weight"
    if damage == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        weights.unlink()
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "missing":
        save_file({k: v for k, v in tensors.items() if k != key}, weights)
    elif damage == "shape":
        save_file(tensors | {key: torch.zeros(24, 41)}, weights)
    else:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(CinemeshError, match=said):
        HuggingFaceEncoder(tmp_path, 16).encode("A dog.")


def test_identity_is_told_at_once_and_follows_what_is_tuned(byt5: Path, tmp_path: Path) -> None:
    for path in byt5.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = HuggingFaceEncoder(tmp_path, 16).identity
    assert before == HuggingFaceEncoder(byt5, 16).identity != HuggingFaceEncoder(byt5, 17).identity
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: value * 1.001 for key, value in tensors.items()}, tmp_path / "model.safetensors")
    assert HuggingFaceEncoder(tmp_path, 16).identity != before


def test_what_a_directory_alone_has_is_not_of_bytes() -> None:
    with pytest.raises(CinemeshError, match="are of a directory's weights"):
        build_encoders([EncoderSettings("a", 8, 4, sharded=True)])
