"""Other exchanges over cp: bytes and seconds by hand, limits where links or compute are all, and any plan."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.clusters.schema import PassConstants
from cinemesh.perf_model.prices.network import Network, group_of
from cinemesh.perf_model.prices.played import PlayedStep, play_step
from cinemesh.perf_model.report.exchanges import LONGEST_RING, Exchange, exchanges

H100, LAYERS, ITEM = load("grand-teton-h100"), 2, 2
CONFIG = replace(preset("movie-gen-30b"), layers=LAYERS)
LATENT = (8, 32, 32)
TOKENS = CONFIG.tokens(LATENT)


def played(plan: Plan, cluster: Cluster = H100) -> PlayedStep:
    return play_step(CONFIG, plan, BatchShape(1, LATENT), cluster)


def priced(plan: Plan, cluster: Cluster = H100) -> tuple[Exchange, Exchange, Exchange]:
    gather, ulysses, ring = exchanges(played(plan, cluster), CONFIG, cluster)
    return gather, ulysses, ring


def tensor_bytes(plan: Plan) -> float:
    """q, K, V or o of one rank."""
    return TOKENS / plan.cp * CONFIG.width / plan.tp * ITEM


# (recompute, tensors gathered or reduced in a block, tensors exchanged)
KEPT = "selective", 6, 8  # q, K, V and o are kept: backward gathers K and V again
AGAIN = "full", 6, 12  # q, K, V and o are made again: one more exchange of each


@pytest.mark.parametrize(("recompute", "gathered", "exchanged"), [KEPT, AGAIN], ids=lambda value: str(value))
@pytest.mark.parametrize(("tp", "cp"), [(1, 2), (2, 4), (4, 2)])
def test_bytes_are_those_of_the_closed_forms(recompute: str, gathered: int, exchanged: int, tp: int, cp: int) -> None:
    """A gather sends 2 S D / tp (cp - 1) / cp, an all-to-all of n tensors n / cp of such a half, a ring whole hops."""
    plan = Plan(tp=tp, cp=cp, recompute=recompute, dtype="bf16")
    gather, ulysses, ring = priced(plan)
    one = LAYERS * tensor_bytes(plan)
    assert gather.sent_bytes == gathered * one * (cp - 1)
    assert ulysses.sent_bytes == exchanged * one * (cp - 1) / cp
    assert ring.sent_bytes == 2 * one * ((cp - 1) + (cp - 1) + cp)


def test_seconds_alone_are_those_of_the_collectives() -> None:
    """By hand: what each block sends, one collective after the other."""
    plan = Plan(tp=2, cp=4, recompute="selective", dtype="bf16")
    gather, ulysses, ring = priced(plan)
    network, group, one = Network(H100), group_of(H100, plan, ("cp",)), int(tensor_bytes(plan))

    def seconds(kind: str, tensors: int) -> float:
        return LAYERS * network.collective(kind, tensors * one, group).seconds

    assert gather.alone_s == pytest.approx(2 * seconds("all_gather", 8) + seconds("reduce_scatter", 8))
    assert ring.alone_s == pytest.approx((3 + 3 + 4) * seconds("send_recv", 2))
    single, double, triple = (seconds("all_to_all", n) for n in (1, 2, 3))
    q_apart, q_beside = double + single, triple  # with K and V where it is there by then
    behind = single + single + single + double  # o, do, dq; dK and dV
    assert any(ulysses.alone_s == pytest.approx(kv + behind) for kv in (q_apart, q_beside))


def test_where_links_are_all_nothing_hides() -> None:
    """Slow links: every exchange is waited for, whole. Slow compute: what stands between two products still is."""
    plan = Plan(cp=4, recompute="selective", dtype="bf16")
    for row in priced(plan, H100.with_(nvlink_scale=1e-4)):
        assert row.exposed_s > 0.98 * row.alone_s, row.name  # units of weights share the links
    slow = H100.with_(**{"gpu.sustained": {"bfloat16": 0.01}})
    _, ulysses, ring = priced(plan, slow)
    assert (
        ring.exposed_s < 0.12 * ring.alone_s
    )  # attention is longer than a hop: one of ten, the last one home, is left
    one = Network(slow).collective("all_to_all", int(tensor_bytes(plan)), group_of(slow, plan, ("cp",))).seconds
    assert 2 * LAYERS * one * (1 - 1e-9) <= ulysses.exposed_s < ulysses.alone_s  # o and dq at least, do hides


def test_the_first_row_is_the_plan_itself() -> None:
    plan = Plan(tp=2, cp=2, dp_shard=2, recompute="selective", dtype="bf16", kv_slices=3)
    step = played(plan)
    gather, *others = exchanges(step, CONFIG, H100)
    own = {i for i, op in enumerate(step.program.ops) if op.is_issue and op.axes == ("cp",)}
    assert gather.runs and not any(row.runs for row in others)
    assert gather.step_s == pytest.approx(step.step_s, rel=1e-12)
    assert gather.exposed_s == pytest.approx(sum(step.timeline.exposed_s.get(i, 0.0) for i in own))
    assert gather.sent_bytes == sum(step.program.wire_bytes(step.program.ops[i]) for i in own)
    for row in others:
        assert row.gain == pytest.approx(step.step_s / row.step_s - 1.0) and not row.problem


def test_attention_sees_all_tokens_of_fewer_heads() -> None:
    """Where a block of attention costs 10 ms to begin, cp times fewer blocks of keys are nearly all that differs.

    What attention takes on such shapes is told by a plan that has them: tp in place of cp.
    """
    cudnn = H100.attention["cudnn"]
    slow = replace(H100, attention={**H100.attention, "cudnn": replace(cudnn, backward=late(cudnn.backward))})
    plan = Plan(cp=4, recompute="selective", dtype="bf16")
    step = played(plan, slow)
    _, ulysses, _ = exchanges(step, CONFIG, slow)
    before, after = attention_s(step), attention_s(played(Plan(tp=4, recompute="selective", dtype="bf16"), slow))
    assert before > 2.0 * after
    saved = (step.step_s - ulysses.step_s) / slow.spread.factor(4)
    assert saved == pytest.approx(before - after, rel=0.01)


def late(law: PassConstants) -> PassConstants:
    return replace(law, prologue_s=1e-2)


def attention_s(of: PlayedStep) -> float:
    kinds = ("attention", "attention_backward")
    return sum(r.seconds for r, op in zip(of.tape.records, of.program.ops, strict=True) if op.kind in kinds)


def test_what_cannot_be_says_why() -> None:
    assert exchanges(played(Plan(tp=2, dtype="bf16")), CONFIG, H100) == []
    _, ulysses, ring = priced(Plan(tp=2, cp=16, dtype="bf16"))
    assert ulysses.problem == "heads(48) % (tp(2) * cp(16)) = 16, it must be 0" and not ulysses.step_s
    assert not ring.problem
    _, ulysses, ring = priced(Plan(cp=2 * LONGEST_RING, dtype="bf16"))
    assert f"cp({2 * LONGEST_RING}) > {LONGEST_RING}" in ring.problem and ulysses.problem
    tiny, odd = preset("tiny"), Plan(cp=3, dtype="bf16")
    batch = BatchShape(1, (2, 4, 6))
    step = play_step(tiny, odd, batch, H100)
    assert "it is priced as kv_chunks = cp, and tokens" in exchanges(step, tiny, H100)[2].problem


@pytest.mark.parametrize("seed", range(8))
def test_any_plan_has_alternatives(seed: int) -> None:
    """Fused, sliced, chunked, recomputed in any way: no record is missed, none waits for ever."""
    draw = random.Random(seed)
    config, tp, cp = replace(preset("tiny"), layers=3, heads=12, width=96), draw.choice((1, 2)), draw.choice((2, 3))
    slices, chunks = draw.choice(((1, 1), (3, 1), (1, 2)))
    plan = Plan(
        tp=tp,
        cp=cp,
        dp_shard=draw.choice((1, 2)),
        micro_batches=draw.choice((1, 2)),
        recompute=draw.choice(("none", "selective", "full", ("o", "lse"), ("q", "kv"), ("kv_gathered",))),
        fused_tp=tp > 1 and draw.random() < 0.5,
        defer_weight_gradients=draw.random() < 0.3,
        dtype="bf16",
        kv_slices=slices,
        kv_chunks=chunks,
    )
    cluster = load(draw.choice(("grand-teton-h100", "gb200-nvl72-ib400")))
    step = play_step(config, plan, BatchShape(2, (2, 12, 12)), cluster)
    gather, ulysses, ring = exchanges(step, config, cluster)
    assert ulysses.sent_bytes < gather.sent_bytes if cp > 2 else ulysses.sent_bytes > 0
    for row in (gather, ulysses, ring):
        assert not row.problem and row.step_s > 0 and row.alone_s > 0
