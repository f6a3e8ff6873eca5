"""Flow matching: what is drawn, the path, the target and the loss (Movie Gen 3.1.2).

    X_t = t * X_1 + (1 - (1 - sigma_min) * t) * X_0        V_t = X_1 - (1 - sigma_min) * X_0
    t = sigmoid(n), n ~ N(0, 1)                            loss = mean over a sample's elements, then over samples

t = 0 is pure noise. Draws are functions of (seed, step, sample id, place, element): see ``kernels/philox.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.philox import Purpose, normal, normals, uniform
from .config import CAPTION_DROPOUT, SIGMA_MIN


def draw_time(seed: int, step: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Logit-normal t, float64 [B]. ``step`` int64 scalar tensor, ``ids`` and ``places`` int64 [B]."""
    return torch.sigmoid(normal(seed, Purpose.TIME, step, ids, torch.zeros_like(ids), places))


def draw_noise(
    seed: int, step: Tensor, ids: Tensor, places: Tensor, shape: tuple[int, ...], purpose: Purpose = Purpose.NOISE
) -> Tensor:
    """X_0, float64 [B, *shape]; the element index is the C-order index in ``shape`` = (C, T, H, W)."""
    elements = math.prod(shape)
    block = torch.arange(-(-elements // 4), device=ids.device)
    drawn = normals(seed, purpose, step, ids[:, None], block, places[:, None]).flatten(1)
    return drawn[:, :elements].view(len(ids), *shape)


def draw_keep_caption(seed: int, step: Tensor, ids: Tensor, places: Tensor, dropout: float = CAPTION_DROPOUT) -> Tensor:
    """Bool [B]: False where the caption is dropped for classifier-free guidance."""
    return uniform(seed, Purpose.CAPTION, step, ids, torch.zeros_like(ids), places) >= dropout


def interpolate(x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(X_t, V_t) of data ``x1`` and noise ``x0``, both [B, ...]; ``t`` is [B]."""
    t = t.view(-1, *[1] * (x1.dim() - 1))
    return t * x1 + (1 - (1 - SIGMA_MIN) * t) * x0, x1 - (1 - SIGMA_MIN) * x0


def drop_captions(text: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The null caption: embeddings of zero, every key valid. ``text`` [L, B, W], ``mask`` bool [B, L], ``keep`` [B]."""
    return text * keep[None, :, None], mask | ~keep[:, None]
