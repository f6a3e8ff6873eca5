"""Model FLOPs are the model's: the same under every plan, and those of the paper's shapes written down by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cinemesh.launch.proof.parity import OPTIMIZER
from cinemesh.model.config import TIME_FEATURES, ModelConfig, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.flops import hardware_flops, model_flops
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.passes.pipeline import prepare

TINY, LATENT = preset("tiny"), (6, 4, 12)
PLANS = (
    "tp=1",
    "dp_replicate=2,dp_shard=2,micro_batches=2",
    "tp=2,cp=2,dp_shard=2,recompute=full",
    "tp=2,cp=2,fused_tp=true,recompute=selective",
    "tp=2,cp=3,kv_chunks=2,kv_first=true,recompute=none",
    "tp=2,cp=2,kv_slices=3,tp_slices=2,grad_units=2,prefetch=2,defer_weight_gradients=true",
)


def by_hand(c: ModelConfig, latent: tuple[int, int, int]) -> int:
    """Of one sample: 2 a multiply-add of forward, and twice that in backward."""
    s, d = c.tokens(latent), c.width
    self_attention = 4 * s * d * d + 2 * s * s * d  # q, k, v, out; scores and values
    cross_attention = 2 * s * d * d + 2 * c.text_tokens * d * d + 2 * s * c.text_tokens * d
    block = self_attention + cross_attention + 3 * s * d * c.ffn
    ends = 2 * s * c.patch_features * d + sum(e.tokens * e.width * d for e in c.encoders)
    time = TIME_FEATURES * d + d * d + 6 * d * d  # two layers, and the shared modulation
    return 3 * 2 * (c.layers * block + ends + time)


def step(plan: Plan, config: ModelConfig = TINY) -> Program:
    return prepare(build_step(config, plan, BatchShape(2, LATENT), OPTIMIZER), backend="nccl")


@pytest.mark.parametrize("text", PLANS)
def test_they_are_the_same_under_every_plan(text: str) -> None:
    """Whatever is split, sliced, fused, run again or by several ranks; they grow with the samples of a step alone."""
    plan = Plan.parse(text)
    assert model_flops(step(plan)) == 2 * plan.data_ranks * plan.micro_batches * by_hand(TINY, LATENT)


def test_they_are_those_of_the_papers_shapes() -> None:
    """30.7 PFLOP a sample: 48 blocks of 6144 at 73,728 tokens, Movie Gen Table 1; two of them are built here."""
    config = preset("movie-gen-30b")
    small = replace(config, layers=2)
    built = build_step(small, Plan(dtype="bf16"), BatchShape(1, (32, 96, 96)))
    assert model_flops(built) == by_hand(small, (32, 96, 96))
    assert by_hand(config, (32, 96, 96)) == pytest.approx(30.7e15, rel=0.005)


def test_hardware_flops_count_what_runs_again() -> None:
    """Attention's backward makes its scores again whatever is kept; recompute adds what it clones."""
    kept, again = (step(Plan.parse(f"recompute={recompute}")) for recompute in ("none", "full"))
    s, d = TINY.tokens(LATENT), TINY.width
    scores = 2 * 2 * TINY.layers * s * (s + TINY.text_tokens) * d
    assert hardware_flops(kept) == pytest.approx(model_flops(kept) + scores, rel=1e-2)
    clones = sum(again.flops(op) for op in again.ops if op.clone)
    assert hardware_flops(kept) < hardware_flops(again) <= hardware_flops(kept) + clones
    assert math.isclose(model_flops(kept), model_flops(again), rel_tol=0)
