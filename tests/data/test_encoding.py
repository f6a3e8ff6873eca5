"""Codec and encoders of a run: built from a recipe's sections, and a kind of codec is added in one place."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from text_models import minilm

from cinemesh.data import encoding
from cinemesh.data.codec import BlockDCTCodec, LatentCodec
from cinemesh.data.encoding import BlockDCT, CodecSettings, Encoding
from cinemesh.data.text import EncoderSettings
from cinemesh.errors import CinemeshError
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.inputs import MASK, text_input

RECIPE = {
    "model": {"preset": "tiny-video"},
    "data": {"cache": "cache", "global_batch": 2, "size": 64, "frames": 9},
    "optimizer": {"lr": 1e-3},
    "schedule": {"steps": 1},
    "logging": {"directory": "run"},
}


def test_captions_are_encoded_as_a_batch() -> None:
    made = Encoding.of(BlockDCT(), [EncoderSettings("a", 4, 6), EncoderSettings("b", 3, 2)])
    inputs = made.captions(["on", "a"])
    assert {name: value.shape for name, value in inputs.items()} == {
        text_input("a"): (4, 2, 6),
        text_input("b"): (3, 2, 2),
        MASK: (2, 7),
    }
    assert inputs[MASK].tolist() == [[True] * 3 + [False] + [True] * 3, [True] * 2 + [False] * 2 + [True] * 2 + [False]]
    assert torch.equal(inputs[text_input("b")][:, 1], made.encoders[1].encode("a")[0])


class Wide(BlockDCTCodec):
    """Stands for a learned autoencoder: other channels, from a file."""

    channels = 3


@dataclass(frozen=True, kw_only=True)
class Learned(CodecSettings):
    path: Path
    kind: Literal["learned"] = "learned"

    def build(self) -> LatentCodec:
        return Wide()


def test_a_new_kind_of_codec_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe, model and errors know it from the table of kinds."""
    monkeypatch.setitem(encoding.CODECS, "learned", Learned)
    setting = Setting.of(check_config({**RECIPE, "codec": {"kind": "learned", "path": "tae"}}, "test"))
    assert setting.encoding.settings == Learned(path=Path("tae")) and setting.model.channels == 3
    for codec, message in (
        ({"kind": "learned"}, "the key 'codec.path' is missing; add it"),
        ({"kind": "learned", "path": "a", "pth": "b"}, "unknown key 'codec.pth'; did you mean 'path'?"),
        (
            {"kind": "lerned"},
            "codec.kind is 'lerned'; did you mean 'learned'? "
            "Known: block-dct, dct-context, frame-dct, diffusers, tae, learned",
        ),
    ):
        with pytest.raises(CinemeshError) as refused:
            check_config({**RECIPE, "codec": codec}, "test")
        assert message in str(refused.value)


def test_diffusers_is_asked_for_when_its_codec_is_and_not_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    settings = encoding.codec_of(str(tmp_path))
    with pytest.raises(CinemeshError, match="holds no autoencoder"):
        settings.build()
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(CinemeshError, match=r"needs the package diffusers; pip install 'cinemesh\[diffusers\]'"):
        settings.build()
    with pytest.raises(CinemeshError, match="--codec diffusers says not which"):
        encoding.codec_of("diffusers")


def test_a_recipe_without_the_section_has_the_block_dct() -> None:
    setting = Setting.of(check_config(RECIPE, "test"))
    assert setting.encoding.settings == BlockDCT() and isinstance(setting.encoding.codec, BlockDCTCodec)


def test_captions_that_are_cut_are_counted_with_the_worst_one() -> None:
    made = Encoding.of(BlockDCT(), [EncoderSettings("a", 4, 6), EncoderSettings("b", 9, 2)])
    (cut,) = made.cuts({"x": "abc", "y": "abcd", "z": "abcdefg"})  # and the end: 4, 5 and 8 tokens
    assert str(cut) == (
        "text encoder a: 2 of 3 captions (67%) have more than its 4 tokens and are cut; the longest, z, has 8"
    )
    assert made.cuts({"x": "abc"}) == []


def test_captions_of_another_script_are_counted_with_the_worst_one() -> None:
    """A sentence may come to one unknown token, beside three of the frame rate: letters count, not tokens."""
    made = Encoding.of(BlockDCT(), [EncoderSettings("bert", 20, None, minilm()), EncoderSettings("bytes", 200, 4)])
    (unknown,) = made.unknown(
        {"amharic": "FPS-16 \u1230\u120b\u121d \u1208\u12d3\u1208\u121d \u12cd\u123b \u12ed\u122e\u1323\u120d",
         "english": "FPS-16 A dog runs.", "mixed": "FPS-16 A dog runs on \u1230\u120b\u121d"}
    )  # fmt: skip
    assert (unknown.encoder, unknown.count, unknown.captions, unknown.worst) == ("bert", 1, 3, "amharic")
    assert unknown.share == pytest.approx(13 / 16)  # of FPS and thirteen letters
    assert "it never learnt most letters" in str(unknown) and str(unknown).endswith("amharic, 81%")
    assert (
        made.unknown({"none": "", "digits": "FPS-24 12:30!", "cyrillic": "\u0421\u043e\u0431\u0430\u043a\u0430"}) == []
    )
