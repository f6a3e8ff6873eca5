"""Prices of making latents: FLOPs over tiles, hours over clips, bytes by hand."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.model.tae.config import tae_preset
from cinemesh.model.tae.work import decoder_work, encoder_work
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.compute import Compute
from cinemesh.perf_model.prices.encoding import EncodingPrice, price_encoding

CONFIG = tae_preset("movie-gen")


def priced(frames: int, px: int = 768, clips: int = 10**8) -> EncodingPrice:
    return price_encoding(CONFIG, frames, px, px, clips, Compute(load("grand-teton-h100")))


def test_a_clip_of_256_frames_is_eight_tiles_and_fifteen_decoded_ones() -> None:
    price = priced(256)
    tile = sum(layer.flops for layer in encoder_work(CONFIG, 32, 768, 768))
    shown = sum(layer.flops for layer in decoder_work(CONFIG, 32, 768, 768))
    assert (price.tiles, price.flops, price.decode_flops) == (8, 8 * tile, 15 * shown)
    assert 440e12 < price.flops < 480e12  # 444 TFLOP without what is over time, counted by hand elsewhere
    assert price.latent_bytes == 2 * 16 * 32 * 96 * 96 and price.pixel_bytes == 256 * 768 * 768 * 3
    assert price.all_latents_bytes == 10**8 * price.latent_bytes
    assert price.largest_map_bytes == 2 * 256 * 32 * 768 * 768  # the decoder's, before its last level narrows


def test_hours_are_between_the_cards_peak_and_a_tenth_of_it() -> None:
    """989 TFLOP/s in bf16 dense: never faster, and no slower than 10 %."""
    price = priced(256)
    assert price.flops / 989e12 < price.seconds < 10 * price.flops / 989e12
    assert price.gpu_hours == pytest.approx(price.seconds * 10**8 / 3600)
    assert priced(256, clips=7).gpu_hours == pytest.approx(7 * price.gpu_hours / 10**8)


def test_a_short_last_tile_is_encoded_whole_and_an_image_is_one() -> None:
    long, short = priced(40, 256), priced(8, 256)
    assert long.tiles == 2 and long.flops == 2 * priced(32, 256).flops
    assert short.tiles == 1 and short.flops == sum(layer.flops for layer in encoder_work(CONFIG, 8, 256, 256))
    assert priced(1, 256).latent_bytes == 2 * 16 * 32 * 32


def test_the_command_says_the_same_and_refuses_what_is_no_shape() -> None:
    shown = CliRunner().invoke(app, ["plan", "--encode", "64x256x256:1000", "--json"])
    assert shown.exit_code == 0, shown.output
    price = json.loads(shown.stdout)
    assert price["predicted"] is True and price["tiles"] == 2 and price["clips"] == 1000
    for words, said in (
        (["--encode", "64x256"], r"is not FRAMESxHEIGHTxWIDTH\[:CLIPS\]"),
        (["--encode", "64x256x256:0"], "is not FRAMES"),
        (["--encode", "64x250x256"], "250 % 8 = 2"),
        (["--encode", "64x256x256", "--gpus", "8"], "--encode beside --gpus"),
    ):
        with pytest.raises(CinemeshError, match=said):
            app(["plan", *words], standalone_mode=False)
