"""The baseline must do the same work under every plan: a wrong one would be an unfair one. Run by name."""

from __future__ import annotations

import pytest
import torch
from benchmarks.live_bytes import LiveBytes
from benchmarks.torch_baseline import Recompute, TorchBaseline, Transformer
from harness import Pool
from torch import Tensor
from torch.distributed.tensor import DTensor

from cinemesh.model.config import PRESETS, USUAL_LATENTS

CONFIG, LATENT, SAMPLES = PRESETS["tiny"], USUAL_LATENTS["tiny"], 4


def gradients(sizes: dict[str, int], recompute: Recompute) -> dict[str, Tensor]:
    """Whole gradients of one fixed global batch in float64; runs in a worker."""
    torch.set_default_dtype(torch.float64)
    try:
        baseline = TorchBaseline(CONFIG, sizes, LATENT, SAMPLES, recompute=recompute)
        # Every rank has drawn the same so far, weights and inputs included, and keeps its share.
        noise = baseline.mine(torch.randn(SAMPLES, CONFIG.tokens(LATENT), CONFIG.patch_features))
        t = torch.full((len(noise),), 0.3)
        baseline.backward(baseline.loss(noise, t))
        return {
            name: (g.full_tensor() if isinstance(g, DTensor) else g).clone()
            for name, p in baseline.model.named_parameters()
            if (g := p.grad) is not None
        }
    finally:
        torch.set_default_dtype(torch.float32)


def losses_and_peak(sizes: dict[str, int]) -> tuple[float, float, int]:
    """The first loss, the one after ten steps, and the peak bytes of a step; runs in a worker."""
    baseline = TorchBaseline(CONFIG, sizes, LATENT, SAMPLES, lr=3e-3)
    first = baseline.step().item()
    for _ in range(10):
        baseline.step()
    with LiveBytes() as live:
        baseline.step()
        live.restart()
        last = baseline.step().item()
    return first, last, live.peak_bytes


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "sizes",
    [{"tp": 2}, {"cp": 2}, {"dp_shard": 2}, {"tp": 2, "cp": 2}],
    ids=lambda sizes: " ".join(f"{axis}={size}" for axis, size in sizes.items()),
)
def test_every_plan_has_the_same_gradients(pool: Pool, sizes: dict[str, int], recompute: Recompute) -> None:
    (alone,) = pool.run(1, gradients, {}, "none")
    ranks = 4 if len(sizes) == 2 else 2
    for name, gradient in pool.run(ranks, gradients, sizes, recompute)[-1].items():
        assert (gradient - alone[name]).abs().max() < 1e-10 * alone[name].abs().max(), name


def test_it_learns_and_its_peak_is_seen(pool: Pool) -> None:
    weights = sum(p.numel() for p in Transformer(CONFIG, "none").parameters())
    for first, last, peak_bytes in pool.run(2, losses_and_peak, {"dp_shard": 2}):
        assert last < first
        # Halves of the fp32 weights, gradients and two moments; at most all of them and as much
        # again of activations.
        assert 4 * 4 * weights / 2 < peak_bytes < 2 * 4 * 4 * weights
