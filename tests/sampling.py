"""A job that samples two small clips: its model, sizes, captions and noise."""

import torch
from torch import Tensor

from cinemesh.kernels.philox import Purpose
from cinemesh.model import flow
from cinemesh.model.config import preset
from cinemesh.model.inputs import IDS, MASK, text_input

TINY = preset("tiny")
LATENT = (3, 4, 12)
SAMPLES = 2  # of the whole job
STEPS = 6
SEED = 5


def captions() -> dict[str, Tensor]:
    """Text [L, B, W] of each encoder, mask [B, L] and ids [B] of all samples, by input name."""
    generator = torch.Generator().manual_seed(3)
    text = {
        text_input(e.name): torch.randn((e.tokens, SAMPLES, e.width), generator=generator, dtype=torch.float64)
        for e in TINY.encoders
    }
    mask = torch.rand((SAMPLES, TINY.text_tokens), generator=generator) > 0.4
    mask[:, 0] = True
    return {**text, MASK: mask, IDS: torch.tensor([11, 4])}


def noise() -> Tensor:
    ids = captions()[IDS]
    shape = (TINY.channels, *LATENT)
    return flow.draw_noise(SEED, torch.tensor(0), ids, torch.zeros_like(ids), shape, Purpose.SAMPLING)
