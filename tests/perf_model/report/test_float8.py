"""What fp8 would give: products and casts by hand, and who has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.prices.played import PlayedStep, play_step
from cinemesh.perf_model.report.float8 import Float8, float8

H100, LATENT = load("grand-teton-h100"), (8, 32, 32)
CONFIG = replace(preset("movie-gen-30b"), layers=1)
ALONE = Plan(recompute="none", dtype="bf16")


def priced(plan: Plan = ALONE, cluster: Cluster = H100) -> tuple[PlayedStep, Mapping[str, Float8]]:
    step = play_step(CONFIG, plan, BatchShape(1, LATENT), cluster)
    return step, {row.name.rpartition(" ")[2]: row for row in float8(step, cluster)}


def test_products_are_flops_over_the_fp8_rate() -> None:
    """Where shapes and floors cost nothing: FLOPs of the block's products, by shape, over the published rates."""
    ideal = replace(H100, matmul=replace(H100.matmul, tile=1, tail=0.0, prologue_s=0.0, floor_s=1e-12, grid=""))
    ideal = ideal.with_(**{"matmul.memory_fraction": 1e6})
    _, rows = priced(cluster=ideal)
    tokens, text, d, ffn = CONFIG.tokens(LATENT), CONFIG.text_tokens, CONFIG.width, CONFIG.ffn
    # q, kv, o, cross q and o on tokens; cross kv on text; gate, up, down
    weights = tokens * (d * d * (1 + 2 + 1 + 1 + 1) + 3 * d * ffn) + text * 2 * d * d
    gpu, flops = H100.gpu, 3 * 2 * weights  # forward, dgrad, wgrad
    for row in rows.values():
        for seconds, dtype in (row.linear_s, "bfloat16"), (row.float8_s, "float8"):
            rate = gpu.peak_flops[dtype] * gpu.sustained[dtype] * H100.matmul.efficiency[dtype]
            assert seconds == pytest.approx(flops / rate, rel=1e-3), dtype


def test_casts_are_the_bytes_of_what_is_cast() -> None:
    """By hand: every activation and gradient that a product reads, once; weights at every use where scaled by row."""
    _, rows = priced()
    tokens, text, d, ffn = CONFIG.tokens(LATENT), CONFIG.text_tokens, CONFIG.width, CONFIG.ffn
    forward = [tokens * d] * 5 + [tokens * ffn, text * d]  # h1, o, x1, cross o, h2; act; context
    backward = (
        [tokens * d] * 5 + [2 * tokens * d] + [tokens * ffn] * 2 + [2 * text * d]
    )  # dy3, dy2, dy1, dq's; dkv; ...
    weights = [d * d] * 4 + [2 * d * d] * 2 + [d * ffn] * 3
    rate, floor = H100.gpu.memory_bytes_per_s * H100.stream.fraction, H100.stream.floor_s
    by_tensor, by_row = [*forward, *backward], [*forward, *backward, *weights, *weights]
    assert rows["tensor"].cast_s == pytest.approx(sum(by_tensor) * 4 / rate + len(by_tensor) * floor)
    assert rows["row"].cast_s == pytest.approx(sum(by_row) * 10 / rate + 2 * len(by_row) * floor)


def test_the_step_gains_what_its_products_do() -> None:
    """On one rank nothing else moves; under degrees, what waits moves too, and recompute is cast again."""
    step, rows = priced()
    for row in rows.values():
        assert row.step_s == pytest.approx(step.step_s + row.float8_s + row.cast_s - row.linear_s, rel=1e-9)
        assert row.gain == pytest.approx(step.step_s / row.step_s - 1.0) and not row.runs and not row.problem
        for told in ("1978.9 TFLOP/s", "0.71", "0.975", "datasheet", "2026"):
            assert told in row.rates
    shared = Plan(tp=2, cp=2, dp_shard=2, recompute="full", fused_tp=True, dtype="bf16")
    step, rows = priced(shared)
    assert 0.0 < rows["tensor"].cast_s < rows["row"].cast_s
    assert rows["tensor"].step_s < rows["row"].step_s and rows["tensor"].linear_s > 1.5 * rows["tensor"].float8_s


@pytest.mark.parametrize(
    ("cluster", "dtype", "told"),
    [
        ("dgx-a100-hdr200", "bf16", "A100 SXM has no float8 rate"),
        ("grand-teton-h100", "float32", "computes in float32"),
    ],
)
def test_who_has_no_fp8_says_so(cluster: str, dtype: str, told: str) -> None:
    on = load(cluster)
    (row,) = float8(play_step(CONFIG, replace(ALONE, dtype=dtype), BatchShape(1, (2, 4, 4)), on), on)
    assert told in row.problem and not row.step_s
