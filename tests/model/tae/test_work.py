"""What an autoencoder is said to compute is what torch counts on its modules; the full-size one has its shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cinemesh.errors import CinemeshError
from cinemesh.model.tae.building import build
from cinemesh.model.tae.config import TAE_PRESETS, TAEConfig, tae_preset
from cinemesh.model.tae.work import decoder_work, encoder_work

FORMS = (*TAE_PRESETS, replace(tae_preset("small"), time="3d"))


@pytest.mark.parametrize("config", FORMS, ids=lambda config: f"{config.name}-{config.time}")
@pytest.mark.parametrize("frames", [1, 9, 32])
def test_flops_and_weights_are_those_of_the_modules(config: TAEConfig, frames: int) -> None:
    """Counted without computing; nine frames are no whole latents. Norms' gains are not products."""
    with torch.device("meta"):
        net = build(config).requires_grad_(False)
        with FlopCounterMode(display=False) as encoder:
            latent = net.encode(torch.empty(1, frames, 3, 64, 48)).mean
        with FlopCounterMode(display=False) as decoder:
            again = net.decode(latent)
    t, h, w = config.latent(frames, 64, 48)
    assert latent.shape == (1, t, config.channels, h, w)
    assert again.shape == (1, t * config.temporal_stride, 3, 64, 48)
    said = encoder_work(config, frames, 64, 48), decoder_work(config, frames, 64, 48)
    assert [sum(layer.flops for layer in layers) for layers in said] == [
        encoder.get_total_flops(),
        decoder.get_total_flops(),
    ]
    gains = sum(value.numel() for name, value in net.named_parameters() if "norm" in name)
    weights = sum(layer.weights for layers in said for layer in layers)
    assert weights + gains == sum(parameter.numel() for parameter in net.parameters())


def test_the_full_size_one_at_1024_px() -> None:
    """Movie Gen 3.1.1: 8x in time, height and width, 16 channels; a tile of 32 frames. Nothing is computed."""
    config = tae_preset("movie-gen")
    with torch.device("meta"):
        net = build(config).requires_grad_(False)
        latent = net.encode(torch.empty(1, 32, 3, 1024, 1024)).mean
        assert latent.shape == (1, 4, 16, 128, 128)
        assert net.decode(latent).shape == (1, 32, 3, 1024, 1024)
    assert sum(parameter.numel() for parameter in net.parameters()) == 114_063_377
    with pytest.raises(CinemeshError, match="1020 % 8 = 4"):
        config.latent(32, 1020, 1024)
