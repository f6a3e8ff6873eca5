"""Goodput: the event simulation against closed forms, and what is proposed against the best that it finds."""

from __future__ import annotations

import math
from dataclasses import astuple, replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster import sidecar
from cinemesh.launch.training.checkpoint.copies import SLOTS
from cinemesh.model.config import parameters, preset
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices import lifetime as module
from cinemesh.perf_model.prices.goodput import (
    DAY_S,
    Conditions,
    best_simulated,
    mean_shares,
    proposed_steps,
    simulate,
    worthwhile_spares,
)
from cinemesh.perf_model.prices.lifetime import COPIES, lifetime

HOUR_S = 3600.0
PLAIN = Conditions(
    step_s=8.74,
    mtbf_s=8.25 * HOUR_S,
    pause_s=1.0,
    write_s=0.0,
    notice_s=0.0,
    hang_s=0.0,
    hang_fraction=0.0,
    restart_s=0.0,
    node_fraction=0.0,
    repair_s=0.0,
)


@pytest.mark.parametrize(("mtbf_h", "steps", "pause_s", "restart_s"), [(8.25, 50, 1.0, 120.0), (2.0, 200, 55.0, 900.0)])
def test_training_is_what_the_exponential_law_says(mtbf_h: float, steps: int, pause_s: float, restart_s: float) -> None:
    """A segment t with its pause d takes (M + R)(exp((t + d) / M) - 1) on average: 400 lives, within four errors."""
    mtbf_s, segment_s = mtbf_h * HOUR_S, steps * PLAIN.step_s
    conditions = replace(PLAIN, mtbf_s=mtbf_s, pause_s=pause_s, restart_s=restart_s)
    found = [simulate(conditions, steps, seed).training for seed in range(400)]
    mean = sum(found) / len(found)
    error = math.sqrt(sum((one - mean) ** 2 for one in found) / (len(found) - 1) / len(found))
    law = segment_s / ((mtbf_s + restart_s) * math.expm1((segment_s + pause_s) / mtbf_s))
    assert abs(mean - law) < 4 * error and error < 5e-4


def test_shares_add_up_and_one_seed_is_one_life() -> None:
    """Causes come from one set of failures, whatever the interval: intervals differ by what they lose alone."""
    conditions = replace(PLAIN, notice_s=10, hang_s=1800, hang_fraction=0.2, restart_s=120, write_s=30)
    conditions = replace(conditions, node_fraction=0.8, repair_s=4 * HOUR_S, spares=1)
    often, rarely = (simulate(conditions, steps, seed=7) for steps in (10, 500))
    for life in (often, rarely):
        assert math.isclose(sum(astuple(life)), 1.0) and min(astuple(life)) >= 0.0
    assert (often.noticing, often.waiting, often.restarting) == (rarely.noticing, rarely.waiting, rarely.restarting)
    assert often.pauses > rarely.pauses and often.repeated < rarely.repeated
    assert simulate(conditions, 10, seed=7) == often != simulate(conditions, 10, seed=8)


def test_each_cause_loses_what_its_failures_take() -> None:
    """By counting: n failures in a life lose n times the seconds of each cause."""
    base = replace(PLAIN, restart_s=100.0)
    count = simulate(base, 50, seed=3).restarting * 60 * DAY_S / 100.0
    assert abs(count - round(count)) < 1e-6 and 100 < count < 250
    hung = simulate(replace(base, hang_fraction=1.0, hang_s=60.0, notice_s=1.0), 50, seed=3)
    assert hung.noticing * 60 * DAY_S / 60.0 == pytest.approx(hung.restarting * 60 * DAY_S / 100.0)
    waited = simulate(replace(base, node_fraction=1.0, repair_s=500.0), 50, seed=3)
    assert waited.waiting * 60 * DAY_S / 500.0 == pytest.approx(waited.restarting * 60 * DAY_S / 100.0)
    assert simulate(replace(base, node_fraction=1.0, repair_s=500.0, spares=5), 50, seed=3).waiting == 0.0


def test_a_checkpoint_holds_once_it_is_written() -> None:
    """What is lost grows by the time of the writing, for each failure: a torn checkpoint is none."""
    slow, fast = (simulate(replace(PLAIN, write_s=write_s), 50, seed=5) for write_s in (200.0, 0.0))
    failures = 60 * DAY_S / PLAIN.mtbf_s
    assert (slow.repeated - fast.repeated) * 60 * DAY_S / failures == pytest.approx(200.0, rel=0.2)


@pytest.mark.parametrize(("node_fraction", "replicated"), [(0.0, False), (1.0, True)])
def test_a_failure_loses_the_steps_since_the_last_copy_in_memory(node_fraction: float, replicated: bool) -> None:
    """Half of what lies between two, and the step in which the last is made whole; not half of an interval."""
    base = replace(PLAIN, node_fraction=node_fraction, restart_s=1.0, spares=1000)
    copied = replace(base, memory_s=5 * PLAIN.step_s, memory_pause_s=0.02, replicated=replicated)
    found = [simulate(copied, 500, seed) for seed in range(40)]
    failures = sum(one.restarting for one in found) * 60 * DAY_S
    lost = sum(one.repeated for one in found) * 60 * DAY_S / failures
    assert lost == pytest.approx((2.5 + 1.0) * PLAIN.step_s, rel=0.05)
    paused = sum(one.pauses for one in found) / len(found)
    assert paused == pytest.approx(0.02 / (5 * PLAIN.step_s) + 1.0 / (500 * PLAIN.step_s), rel=0.05)
    assert all(math.isclose(sum(astuple(one)), 1.0) for one in found)


def test_a_lost_node_takes_copies_along_that_no_other_has() -> None:
    """Then storage is what is left, and copies changed nothing but what they pause."""
    lost = replace(PLAIN, node_fraction=1.0, restart_s=1.0, spares=1000)
    copied = replace(lost, memory_s=5 * PLAIN.step_s, memory_pause_s=0.0, replicated=False)
    assert simulate(copied, 50, seed=2) == simulate(lost, 50, seed=2)


@pytest.mark.parametrize("mtbf_h", [1.0, 8.25, 100.0])
@pytest.mark.parametrize("pause_s", [0.05, 1.0, 55.0])
@pytest.mark.parametrize("step_s", [0.3, 8.74])
def test_what_is_proposed_is_within_a_thousandth_of_the_best(mtbf_h: float, pause_s: float, step_s: float) -> None:
    """The fixed default of 500 steps loses up to ten points there."""
    conditions = replace(PLAIN, mtbf_s=mtbf_h * HOUR_S, pause_s=pause_s, step_s=step_s, write_s=20.0, restart_s=120.0)
    _, best = best_simulated(conditions, lives=4)
    assert best - mean_shares(conditions, proposed_steps(conditions), lives=4).training < 1e-3


def test_spares_are_worth_their_own_cost() -> None:
    """None where nothing takes a node out; more where repairs take longer; each is paid."""
    broken = replace(PLAIN, node_fraction=0.78, repair_s=4 * HOUR_S, restart_s=120.0)
    assert worthwhile_spares(PLAIN, 768, 8) == 0
    few, many = worthwhile_spares(broken, 768, 8), worthwhile_spares(replace(broken, repair_s=48 * HOUR_S), 768, 20)
    assert 1 <= few < many
    rare = replace(broken, mtbf_s=800 * HOUR_S)
    assert worthwhile_spares(rare, 4, 8) == 0  # a fifth of all nodes, idle


def test_the_plan_of_the_30b_lives_as_its_cluster_file_says() -> None:
    """Llama 3's rate gives 6,144 GPUs 8.25 h, Meta's research clusters' 4.8; the bytes are those of four states."""
    config, plan = preset("movie-gen-30b"), Plan.parse("tp=2,cp=4,dp_shard=96,dp_replicate=8")
    found = lifetime(config, plan, load("grand-teton-h100"), 8.74, 768)
    weights = sum(math.prod(parameter.shape) for parameter in parameters(config))
    assert found.checkpoint_bytes == 16 * weights and found.rank_bytes == math.ceil(16 * weights / 768)
    assert COPIES == SLOTS
    copies = found.in_memory
    assert copies is not None and copies.replicated, "a replica lies 96 servers away"
    assert copies.server_bytes == 2 * 8 * math.ceil(16 * weights / 768) and 1 <= copies.steps < found.usual.steps / 4
    assert found.usual.shares.training + 0.002 < copies.training < 1 - found.usual.shares.restarting
    inner = Plan.parse("tp=2,cp=4,dp_shard=96,dp_replicate=8,order=dp_replicate:tp:cp:dp_shard")
    beside = lifetime(config, inner, load("grand-teton-h100"), 8.74, 768).in_memory
    assert beside is not None and not beside.replicated, "a server has all replicas of its shards"
    assert beside.training < copies.training
    assert found.usual.mtbf_s / HOUR_S == pytest.approx(8.25, abs=0.01)
    assert found.low.mtbf_s / HOUR_S == pytest.approx(4.8, abs=0.01)
    assert found.low.shares.training < found.usual.shares.training < 1
    for one in (found.usual, found.low):
        assert one.best_training - one.shares.training < 1e-3 and one.interval_s == one.steps * 8.74
        assert one.samples_per_day == pytest.approx(768 / 8.74 * 86400 * one.shares.training)
        paid = 6144 * (1 + one.spares / 768)
        assert one.gpu_hours == pytest.approx(1e6 / one.samples_per_day * 24 * paid)
    with pytest.raises(CinemeshError, match="local-cpu says nothing of failures"):
        lifetime(config, plan, load("local-cpu"), 8.74, 768)


def test_constants_of_the_trainer_are_the_trainers() -> None:
    """Planning loads no torch, so they are written twice."""
    assert (module.HANG_S, module.HANG_STEPS) == (sidecar.LEAST_S, sidecar.TIMES)
