"""The specification against torch's own FSDP2, DTensor and context_parallel, on gloo processes.

Only this finds a mistake that model/reference.py shares with the hand-built step: the two came from
one reading of the model; the oracle's modules, layouts, positions and reductions are torch's or
written apart.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from harness import Pool
from oracle import (
    build_oracle,
    full_gradients,
    full_weights,
    oracle_loss,
    oracle_update,
    random_batch,
    random_weights,
)
from torch import Tensor, nn

from cinemesh.model.config import PRESETS, USUAL_LATENTS, ModelConfig, parameters
from cinemesh.model.reference import Reference, training_loss

Run = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]  # losses, first gradients, last weights

CONFIG = PRESETS["tiny"]
V_PREDICTION = replace(CONFIG, objective="v-prediction")
DIT = replace(CONFIG, block="dit", ffn=144)  # 3/2 of the FFN: as many weights
LATENT = USUAL_LATENTS["tiny"]
SAMPLES = 2
STEPS = 3
LR = 1e-3
WEIGHT_DECAY = 0.1
MAX_NORM = 0.5  # the gradient norm is about 5, so every step clips
DROPOUT = 0.5  # drops one of the two captions in the first step


def oracle_run(config: ModelConfig, sizes: dict[str, int]) -> Run:
    """Three steps on the calling ranks; runs in a worker."""
    weights = random_weights(config, 1, torch.float64)
    oracle = build_oracle(config, weights, sizes, lr=LR, weight_decay=WEIGHT_DECAY)
    batch = random_batch(config, LATENT, SAMPLES, 5, torch.float64)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        losses.append(oracle_loss(oracle, batch, seed=7, step=step, caption_dropout=DROPOUT))
        gradients = gradients or full_gradients(oracle)
        oracle_update(oracle, MAX_NORM)
    return losses, gradients, full_weights(oracle)


@lru_cache(maxsize=3)
def reference_run(config: ModelConfig) -> Run:
    """The same three steps on one device."""
    model = Reference(config).double()
    model.load_state_dict(random_weights(config, 1, torch.float64))
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[r.name] for r in parameters(config) if r.decay == decay], "weight_decay": rate}
        for decay, rate in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    batch = random_batch(config, LATENT, SAMPLES, 5, torch.float64)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = training_loss(model, batch, seed=7, step=step, caption_dropout=DROPOUT)
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        assert nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM) > 2 * MAX_NORM
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {name: p.detach() for name, p in named.items()}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest max|a-b| / max|b| of any tensor, and its name."""
    assert actual.keys() == expected.keys()
    assert all(tensor.isfinite().all() for tensor in actual.values())
    return max((((actual[n] - b).abs().max() / b.abs().max()).item(), n) for n, b in expected.items())


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (CONFIG, {"tp": 2}),
        (CONFIG, {"cp": 2}),
        (CONFIG, {"dp_shard": 2}),
        (CONFIG, {"tp": 2, "cp": 2}),
        (CONFIG, {"tp": 2, "dp_shard": 2}),
        (CONFIG, {"dp_replicate": 2}),
        (V_PREDICTION, {"dp_shard": 2}),
        (V_PREDICTION, {"tp": 2, "cp": 2}),
        (DIT, {"dp_shard": 2}),
        (DIT, {"tp": 2, "cp": 2}),
    ],
    ids=lambda given: (
        f"{given.objective} {given.block}"
        if isinstance(given, ModelConfig)
        else " ".join(f"{axis}={size}" for axis, size in given.items())
    ),
)
def test_torch_parallelism_computes_the_reference(pool: Pool, config: ModelConfig, sizes: dict[str, int]) -> None:
    # Measured on every plan: loss 2e-15, gradients 5e-14, weights 2e-12. AdamW divides by sqrt(v) +
    # eps, which turns the rounding of a small gradient into a larger one of the update: hence
    # weights get 1e-10. Gradients are compared before AdamW: clipping and Adam undo any common
    # factor, such as a sum over tp counted twice.
    ranks = 1
    for size in sizes.values():
        ranks *= size
    losses, gradients, weights = reference_run(config)
    for rank, (got_losses, got_gradients, got_weights) in enumerate(pool.run(ranks, oracle_run, config, sizes)):
        assert got_losses == pytest.approx(losses, rel=1e-12), rank
        assert worst(got_gradients, gradients) < (1e-11, ""), rank
        assert worst(got_weights, weights) < (1e-10, ""), rank


@pytest.mark.parametrize("config", [CONFIG, V_PREDICTION, DIT], ids=["as it is", "v-prediction", "dit"])
def test_every_gradient_is_visible(config: ModelConfig) -> None:
    # A parameter whose gradient is far below the others could be wrong without the check above
    # noticing much.
    sizes = {name: g.abs().max().item() for name, g in reference_run(config)[1].items()}
    assert min(sizes.values()) > 1e-3 * max(sizes.values()), min(sizes, key=sizes.__getitem__)
