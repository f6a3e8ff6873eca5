"""The waterfall: it adds up on any plan, and each constant moves its own loss and none above it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.flops import hardware_flops, model_flops
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.clusters.schema import Measured
from cinemesh.perf_model.prices.encoders import FrozenCost
from cinemesh.perf_model.prices.played import PlayedStep, play_step
from cinemesh.perf_model.report import waterfall as module
from cinemesh.perf_model.report.draw_waterfall import KINDS, draw_waterfall
from cinemesh.perf_model.report.explain import mfu
from cinemesh.perf_model.report.waterfall import CAUSES, Loss, told, waterfall

H100, LAYERS = load("grand-teton-h100", packages="fa3"), 2  # its attention leaves SMs
CALIBRATED = replace(load("local-cpu"), measured=Measured(floor_s={"swiglu": 1e-4}, bytes_per_s={"swiglu": 1e9}))
LARGE = replace(preset("movie-gen-30b"), layers=LAYERS)  # products of its width are not bound by memory
LATENT = (8, 32, 32)
SHARED = Plan(tp=2, cp=2, dp_shard=4, dp_replicate=2, recompute="selective", grad_units=2, dtype="bf16")


def played(plan: Plan, cluster: Cluster = H100, frozen: FrozenCost | None = None) -> PlayedStep:
    return play_step(LARGE, plan, BatchShape(1, LATENT), cluster, frozen)


def seconds(plan: Plan, cluster: Cluster = H100, frozen: FrozenCost | None = None) -> Mapping[str, float]:
    return {loss.name: loss.seconds for loss in waterfall(played(plan, cluster, frozen), cluster)}


def moved(before: Mapping[str, float], after: Mapping[str, float]) -> set[str]:
    """Losses that are not the same; sums of a thousand records differ in their last digits."""
    scale = sum(before.values())
    return {name for name in before.keys() | after.keys() if abs(before[name] - after[name]) > 1e-12 * scale}


# -- it adds up -------------------------------------------------------------------------------------------------------


def some_plan(draw: random.Random) -> tuple[Plan, Cluster]:
    cluster = draw.choice((H100, CALIBRATED, *map(load, ("h100-hbm2e-500w", "gb200-nvl72-ib400", "local-cpu"))))
    on_gpus = cluster.device == "cuda"
    tp, cp = draw.choice((1, 2)), draw.choice((1, 2, 3))
    shard = draw.choice((1, 2, 4)) if on_gpus else 1
    plan = Plan(
        tp=tp if on_gpus else 1,
        cp=cp if on_gpus else draw.choice((1, 2)),
        dp_shard=shard,
        dp_replicate=draw.choice((1, 2)) if on_gpus else 1,
        micro_batches=draw.choice((1, 2)),
        recompute=draw.choice(("none", "selective", "full", ("o", "lse"))),
        fused_tp=tp > 1 and on_gpus and draw.random() < 0.5,
        kv_slices=3 if cp > 1 and tp == 1 and draw.random() < 0.3 else 1,
        sm_margin=draw.choice((0, 8)) if cluster is H100 else 0,
        dtype="bf16" if on_gpus else "float32",
    )
    return plan, cluster


@pytest.mark.parametrize("seed", range(12))
def test_losses_and_mfu_add_up_to_the_peak(seed: int) -> None:
    """MFU by its own definition, from model FLOPs: a part of the step that no loss names would be missing here."""
    plan, cluster = some_plan(random.Random(seed))
    frozen = FrozenCost(0, 1e-3 * seed, ()) if seed % 3 == 0 else None
    step = play_step(preset("tiny"), plan, BatchShape(2, (2, 12, 12)), cluster, frozen)
    losses = waterfall(step, cluster)
    left = mfu(step, cluster)
    assert sum(loss.share for loss in losses) == pytest.approx(1.0 - left, abs=1e-9)
    assert sum(loss.share for loss in told(losses)) == pytest.approx(1.0 - left, abs=1e-9)
    assert losses[-1].ceiling == pytest.approx(left, rel=1e-9)
    assert all(loss.kind in KINDS and loss.share * step.step_s == pytest.approx(loss.seconds) for loss in losses)
    # gradients that nobody reads are FLOPs that the model's count has and no rank runs
    assert all(loss.seconds > -1e-12 for loss in losses if loss.name != "alike on several ranks")


def test_ops_that_were_measured_lose_by_their_own_table() -> None:
    """Bytes and floors of a calibrated file's table are losses as those of the law are."""
    found = []
    for change in {}, {"floor_s": {"swiglu": 1.0}}, {"bytes_per_s": {"swiglu": 1e6}}:
        cluster = replace(CALIBRATED, measured=replace(CALIBRATED.measured, **change))  # type: ignore[type-var]
        step = play_step(preset("tiny"), Plan(recompute="none"), BatchShape(1, (2, 4, 4)), cluster)
        found.append({loss.name: loss.seconds for loss in waterfall(step, cluster)})
    assert moved(found[0], found[1]) == {"short kernels"} and moved(found[0], found[2]) == {"memory-bound ops"}


def test_a_loss_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: waits for one lane are not counted."""
    step = played(SHARED)
    lanes = module.exposed_by_lane(step)
    assert lanes.pop("tp") > 0.0
    monkeypatch.setattr(module, "exposed_by_lane", lambda _: lanes)
    assert sum(loss.share for loss in waterfall(step, H100)) < 1.0 - mfu(step, H100) - 1e-3


# -- against formulas by hand -----------------------------------------------------------------------------------------


def test_work_and_clock_are_those_of_the_flops() -> None:
    """Closed forms from shapes and FLOP counts; the waterfall itself knows only prices."""
    step, peak = played(Plan(recompute="none", dtype="bf16")), H100.gpu.peak_flops["bfloat16"]
    found = {loss.name: loss.seconds for loss in waterfall(step, H100)}
    tokens, text = LARGE.tokens(LATENT), LARGE.text_tokens
    scores = 2 * LAYERS * (tokens * tokens + tokens * text) * LARGE.width  # one more product in each of the backwards
    assert found["attention's scores again"] == pytest.approx(scores / peak, rel=1e-6)
    beyond = hardware_flops(step.program) - model_flops(step.program) - scores
    assert found["alike on several ranks"] == pytest.approx(beyond / peak, rel=1e-6)
    slow = 1.0 / H100.gpu.sustained["bfloat16"] - 1.0
    assert found["clock"] == pytest.approx(slow * hardware_flops(step.program) / peak, rel=1e-6)


def test_recompute_is_what_the_records_made_again_take() -> None:
    step = played(replace(SHARED, recompute="full"))
    again = sum(r.seconds for r, op in zip(step.tape.records, step.program.ops, strict=True) if op.clone and r.computes)
    assert {loss.name: loss.seconds for loss in waterfall(step, H100)}["recompute"] == pytest.approx(again) and again


# -- each constant moves its own loss ---------------------------------------------------------------------------------

KERNELS = {cause.name for cause in CAUSES} - {"clock", "short kernels"}
MATMUL, ATTENTION = {"matmul kernels", "matmul shapes"}, {"attention kernels", "attention shapes"}
SLOW_ROWS = replace(H100.attention["fa3"], backward=replace(H100.attention["fa3"].backward, speed={"128": 3e14}))
SHORT_ROWS = replace(H100.attention["fa3"], forward=replace(H100.attention["fa3"].forward, prologue_s=9e-6))
# (what is changed), the loss that it is, those below that it multiplies
MOVES: list[tuple[dict[str, Any], str, set[str]]] = [
    ({"gpu.sustained": {"bfloat16": 0.7}}, "clock", KERNELS),
    ({"matmul.efficiency": {"bfloat16": 0.7}}, "matmul kernels", {"matmul shapes", "memory-bound ops"}),
    ({"matmul.prologue_s": 1e-6}, "matmul shapes", {"memory-bound ops"}),
    ({"matmul.grid": ""}, "matmul shapes", {"memory-bound ops"}),
    ({"attention.fa3": SLOW_ROWS}, "attention kernels", {"attention shapes"}),
    ({"attention.fa3": SHORT_ROWS}, "attention shapes", set()),
    ({"gpu.memory_bytes_per_s": 2e12}, "memory-bound ops", set()),
    ({"stream.fraction": 0.5}, "memory-bound ops", set()),
    ({"stream.floor_s": 9e-6}, "short kernels", set()),
    ({"matmul.floor_s": 9e-6}, "short kernels", set()),
    ({"launch.graph_s": 9e-5}, "short kernels", set()),
]


@pytest.mark.parametrize(("change", "own", "below"), MOVES, ids=[next(iter(change)) for change, *_ in MOVES])
def test_a_constant_of_compute_moves_its_own_loss(change: dict[str, Any], own: str, below: set[str]) -> None:
    """On one rank, where nothing waits: no other loss moves but those that the constant multiplies."""
    alone, cluster = Plan(recompute="none", dtype="bf16"), H100.with_(**change)
    before, after = seconds(alone), seconds(alone, cluster)
    changed = moved(before, after)
    assert own in changed and changed <= {own} | below


def test_what_the_plan_and_the_timeline_cost_moves_alone() -> None:
    alone, before = Plan(recompute="none", dtype="bf16"), seconds(SHARED)
    assert moved(seconds(alone), seconds(replace(alone, recompute="full"))) == {"recompute"}
    assert moved(before, seconds(SHARED, H100.with_(**{"spread.step_fraction": 0.03}))) == {"stragglers"}
    # all that the timeline decides depends on all of it, and stragglers are a share of the whole
    waits = {name for name in before if name.startswith("exposed ")} | {"slowed by collectives", "stragglers"}
    for change, own in (
        ({"overlap.compute_slowdown": 0.0}, "slowed by collectives"),
        ({"nic_scale": 0.25}, "stragglers"),
    ):
        changed = moved(before, seconds(SHARED, H100.with_(**change)))
        assert own in changed and changed <= waits
    free = seconds(SHARED, H100.with_(**{"overlap.compute_slowdown": 0.0}))
    assert free["slowed by collectives"] == pytest.approx(0.0, abs=1e-15)  # a difference of sums
    assert moved(before, seconds(SHARED, frozen=FrozenCost(0, 0.1, ()))) == {"frozen encoders", "stragglers"}
    margin = moved(seconds(SHARED), seconds(replace(SHARED, sm_margin=16)))
    assert "SMs left to collectives" in margin and not margin & {"attention's scores again", "alike on several ranks"}


# -- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [13.5, 4.15])
def test_the_bars_lead_from_the_peak_to_the_mfu(width: float) -> None:
    """Each begins where the one above it ends."""
    step = played(SHARED)
    losses, left = told(waterfall(step, H100)), mfu(step, H100)
    with mpl.rc_context():
        figure = Figure(figsize=(width, 6.0))
        draw_waterfall(figure, losses, left)
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
    assert ends[0] == (0.0, 1.0) and ends[-1] == (0.0, pytest.approx(left))
    for (_, end), (before, _) in zip(ends[1:-1], ends[:-2], strict=True):
        assert end == pytest.approx(before if before else 1.0)
    assert ends[-2][0] == pytest.approx(left)
    texts = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(f"{loss.share:.1%}" in texts for loss in losses)


def test_small_losses_are_told_as_one() -> None:
    losses = [
        Loss("a", "work", 1.0, 0.5, 0.5, ""),
        Loss("b", "job", 8e-4, 4e-4, 0.4996, ""),
        Loss("c", "job", 0, 0, 0.4996, ""),
    ]
    assert [loss.name for loss in told(losses)] == ["a", "all others"]
    assert told(losses)[-1].seconds == 8e-4 and told(losses)[-1].ceiling == 0.4996
    assert told([losses[0], losses[2]]) == [losses[0]]
