"""A whole training step through the registry, every op that has a Triton kernel on it, against the reference.

Kernels are proven one by one elsewhere; this catches a kernel that is bound to the wrong op, called with attributes or
layouts that only the program makes (views into flat units, heads at an offset, sums added in place), or not called.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from cinemesh.kernels.catalogue import IMPLEMENTATIONS
from cinemesh.kernels.reference import Kernel
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.parity import OPTIMIZER
from cinemesh.launch.proof.verify import small_case, verify_in
from cinemesh.model.config import Encoder, ModelConfig
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, BatchShape, text_input
from cinemesh.model.runner import StepRunner
from cinemesh.model.step import Optimizer
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.plan import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = ModelConfig("one-block", 1, 128, 2, 40, (Encoder("a", 24, 3), Encoder("b", 40, 5)), channels=4)
BATCH = BatchShape(2, (1, 4, 6))


def step(package: str, dtype: Any, ran: set[str]) -> tuple[float, float, torch.Tensor]:
    """Loss, gradient norm and first moments after one step; ``ran`` gets the ops that were called."""

    def noted(op: str, kernel: Kernel) -> Kernel:
        def call(*tensors: Any, **attrs: Any) -> None:
            ran.add(op)
            kernel(*tensors, **attrs)

        return call

    kernels = {op: noted(op, kernel) for op, kernel in kernels_for(DEVICE, {"all": package}).items()}
    runner = StepRunner(CONFIG, Plan(dtype=dtype), BATCH, Optimizer(), None, device=DEVICE, kernels=kernels)
    runner.initialise(probe_values(1))
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, *BATCH.latent, generator=draw)
    text = {text_input(e.name): torch.randn(e.tokens, 2, e.width, generator=draw) for e in CONFIG.encoders}
    mask = torch.arange(8)[None] < torch.tensor([[8], [5]])
    runner.load(0, {LATENTS: latents, IDS: torch.tensor([3, 3]), PLACES: torch.arange(2), MASK: mask, **text})
    runner.step(1e-2)
    return runner.loss.item(), runner.gradient_norm.item(), runner.buffers["exp_avg"].double().cpu()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("dtype=float32,recompute=none", marks=pytest.mark.slow),  # 10 CPU s each, interpreted
        pytest.param("dtype=float32,recompute=selective", marks=pytest.mark.slow),
        "dtype=float32,recompute=full",
    ],
)
def test_a_step_on_triton_is_what_autograd_says(text: str) -> None:
    """In float64, by the bounds of ``cinemesh verify``, whichever activations are made again, for two blocks."""
    case = small_case(Plan.parse(text), head_dim=64, steps=1)
    kernels = kernels_for(DEVICE, {"all": "triton"})
    runner = StepRunner(
        case.config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed, device=DEVICE, kernels=kernels
    )
    found = verify_in(case, None, runner)
    assert found is not None and all(found.worst[what] <= found.bounds[what] for what in found.bounds), found


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bf16", 3e-2)])
def test_a_step_on_triton_is_the_step(dtype: str, bound: float) -> None:
    ran: set[str] = set()
    loss, norm, moments = step("reference", dtype, set())
    found = step("triton", dtype, ran)
    assert found[0] == pytest.approx(loss, rel=bound)
    assert found[1] == pytest.approx(norm, rel=bound)
    assert (found[2] - moments).norm() <= bound * moments.norm()
    elsewhere = {"unpatchify", "position_modulate_norm", "merge_attention", "sum_parts"}  # the last two: with cp alone
    assert ran >= {entry.op for entry in IMPLEMENTATIONS if entry.package == "triton"} - elsewhere
