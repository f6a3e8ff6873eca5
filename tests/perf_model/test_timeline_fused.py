"""A fused record over tp on the timeline: both lanes held, the derived seconds, and what a whole step makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemesh.errors import CinemeshError
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.collectives import FUSED
from cinemesh.parallel.ir.flops import hardware_flops
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.fuse_tp import pipelined_s
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.compute import Compute
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.prices.network import Cost, Network, group_of, groups_of
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.prices.timeline import COMPUTE, FUSE, ISSUE, WAIT, Record, Tape, play, price
from cinemesh.perf_model.report.draw_step import STYLES, style_of
from cinemesh.perf_model.report.explain import describe, exposures
from cinemesh.perf_model.report.trace import predicted
from cinemesh.perf_model.search.evaluator import Evaluator
from cinemesh.perf_model.search.extrapolate import Extrapolation
from cinemesh.perf_model.search.few_blocks import FewBlocks
from cinemesh.perf_model.search.planner import search
from cinemesh.perf_model.search.request import LatentBucket, PricedPlan, Request, Timed

EXACT = 1e-12
TP, CP = 0, 1


def cost(transfer_s: float, latency_s: float = 0.0, link: str = "nvlink", sms: int = 0) -> Cost:
    return Cost(latency_s, transfer_s, link, sms, 0.0, "ring", "Simple")


def tape(*records: Record, beside: float = 1.0) -> Tape:
    return Tape(list(records), 100, 1e12, 1.0, beside)


def fused(seconds: float, what: Cost, ranks: int = 4) -> Record:
    return Record(FUSE, seconds, key=TP, cost=what, alone_s=seconds / ranks)


def issue(communicator: int, what: Cost) -> Record:
    return Record(ISSUE, key=communicator, cost=what)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 8.0), st.floats(0.01, 8.0), st.sampled_from((2, 4, 8)))
def test_a_record_alone_takes_what_was_derived(compute_s: float, transfer_s: float, ranks: int) -> None:
    played = play(tape(fused(compute_s, cost(transfer_s), ranks)))
    assert played.step_s == pytest.approx(pipelined_s(compute_s, transfer_s, ranks))
    assert played.exposed_s[0] == pytest.approx(max(0.0, transfer_s - compute_s * (ranks - 1) / ranks))
    assert played.compute_busy_s == pytest.approx(compute_s)


def test_its_latency_hides_behind_nothing() -> None:
    played = play(tape(fused(4.0, cost(1.0, latency_s=0.5))))
    assert (played.step_s, played.exposed_s[0]) == (pytest.approx(4.5, abs=EXACT), pytest.approx(0.5, abs=EXACT))


def test_it_waits_for_its_communicator() -> None:
    """A collective over tp in flight, on another link even, holds it."""
    played = play(tape(issue(TP, cost(3.0, link="nic")), fused(4.0, cost(1.0)), Record(WAIT, key=0)))
    assert (played.start[1], played.step_s) == (pytest.approx(3.0, abs=EXACT), pytest.approx(7.0, abs=EXACT))


def test_it_does_not_wait_for_another_communicator() -> None:
    played = play(tape(issue(CP, cost(3.0, link="nic")), fused(4.0, cost(1.0)), Record(WAIT, key=0)))
    assert (played.start[1], played.step_s) == (0.0, pytest.approx(4.0, abs=EXACT))


def test_it_starts_after_all_that_was_issued_before_it() -> None:
    """The second collective over cp has not started before the first has ended."""
    played = play(tape(issue(CP, cost(1.0, link="nic")), issue(CP, cost(1.0, link="nic")), fused(4.0, cost(1.0))))
    assert played.start[2] == pytest.approx(1.0, abs=EXACT)


def test_what_follows_over_tp_waits_for_it_and_over_cp_for_compute_alone() -> None:
    """Issued behind it, a collective starts when it has ended; a record of compute too."""
    after = (issue(TP, cost(1.0)), issue(CP, cost(1.0, link="nic")), Record(COMPUTE, 1.0))
    played = play(tape(fused(4.0, cost(5.0)), *after))
    assert played.end[0] == pytest.approx(6.0, abs=EXACT)
    assert played.start[1:] == [pytest.approx(6.0, abs=EXACT)] * 3


def test_it_shares_its_link_and_slows_beside_compute() -> None:
    shared = play(tape(issue(CP, cost(1.0)), fused(0.4, cost(1.0)), Record(WAIT, key=0)))
    assert shared.step_s == pytest.approx(2.1, abs=EXACT), "two transfers over one link, then one rank's product"
    slowed = play(tape(fused(4.0, cost(2.5)), beside=1.25))
    assert slowed.step_s == pytest.approx(3.0 + 0.1 + 1.0, abs=EXACT), "2.4 of 2.5 s move in the 3 s of compute"


# -- steps ------------------------------------------------------------------------------------------------------------

BIG = preset("movie-gen-30b")
LATENT = (32, 96, 96)
CLUSTER = load("grand-teton-h100", packages="fa3")  # whose kernels can leave SMs alone
PLAN = Plan(tp=4, cp=2, dp_shard=8, grad_units=2, fused_tp=True)


def test_a_record_is_priced_by_its_parts() -> None:
    config = replace(BIG, layers=1)
    compute, network = Compute(CLUSTER), Network(CLUSTER)
    plans = (PLAN, replace(PLAN, fused_tp=False))
    programs = [prepare(build_step(config, plan, BatchShape(1, LATENT)), backend="nccl") for plan in plans]
    tapes = [price(program, compute, network, CLUSTER) for program in programs]
    plain = {op.name: record for op, record in zip(programs[1].ops, tapes[1].records, strict=True)}
    found = 0
    for op, record in zip(programs[0].ops, tapes[0].records, strict=True):
        if op.kind not in FUSED:
            continue
        found += 1
        products = sum(plain[part.name].seconds for part in op.parts if part.kind == "matmul")
        alone = plain[op.name].cost
        assert (record.cost.latency_s, record.cost.transfer_s) == (alone.latency_s, alone.transfer_s)
        assert record.cost.sms == 0 < alone.sms, "copies take no SMs"
        copied = record.seconds - products
        assert record.alone_s == pytest.approx(products / 4 + copied)
        rows = programs[0].bytes(op.inputs[0] if op.kind == "gather_matmul" else op.outputs[0])
        passes = {"gather_matmul": 2, "matmul_scatter": 4 + 1}[op.kind]
        assert copied == pytest.approx(compute.stream_s(passes * rows))
    assert found == 12


def test_on_gloo_nothing_runs_beside() -> None:
    local = load("local-cpu")
    config, plan = preset("tiny-video"), Plan(tp=2, fused_tp=True, dtype="float32")
    program = prepare(build_step(config, plan, BatchShape(1, (2, 16, 16))), backend="gloo")
    found = price(program, Compute(local), Network(local), local)
    assert all(r.cost.transfer_s == 0.0 < r.cost.latency_s for r in found.records if r.kind == FUSE)


def test_a_step_shows_it() -> None:
    config = replace(BIG, layers=4)
    made = play_step(config, PLAN, BatchShape(1, LATENT), CLUSTER)
    plain = play_step(config, replace(PLAN, fused_tp=False), BatchShape(1, LATENT), CLUSTER)
    assert made.timeline.step_s < plain.timeline.step_s
    assert made.timeline.step_s == pytest.approx(made.timeline.compute_busy_s + made.timeline.total_exposed_s)
    assert hardware_flops(made.program) == hardware_flops(plain.program)
    assert "fused_tp=true" in describe(PLAN)
    assert {"gather_matmul", "matmul_scatter"} <= {row.kind for row in exposures(made)}
    assert made.footprint.by_class["workspace"] >= 2 * made.program.bytes("mb0/blocks.0.forward/y1")
    lanes = {span.lane for span in predicted(made) if span.kind == "gather_matmul"}
    assert lanes == {"compute", "tp"}
    assert {style_of(span) for span in predicted(made)} <= set(STYLES), "the picture knows how to draw it"


@pytest.mark.parametrize("defer", [False, True])
def test_a_few_blocks_say_what_the_whole_48_layers_take(defer: bool) -> None:
    plan = replace(PLAN, dp_shard=768, defer_weight_gradients=defer)
    few = FewBlocks.build(BIG, plan, BatchShape(1, LATENT))
    models = PriceModels.of(CLUSTER)
    step = Extrapolation(few, plan, models)
    priced = step.price(plan)
    made = play_step(BIG, plan, BatchShape(1, LATENT), CLUSTER)
    asked = Request(BIG, (LatentBucket(LATENT),), CLUSTER, plan.world_size)
    choice = PricedPlan(plan, 1, priced.step_s, priced.compute_s, 0.0, 0, plan.data_ranks)
    settled = Evaluator(asked).settled(choice)  # deferred, no two blocks are alike: then the whole step is played
    assert settled.timed is (Timed.PLAYED if defer else Timed.STEADY)
    assert settled.step_s == pytest.approx(made.step_s, rel=1e-3)
    lives = lifetimes(made.program, workspace=made.workspaces.bytes)
    assert step.peak_bytes(plan) == pytest.approx(lives.peak_bytes + max(lives.workspace_bytes), rel=1e-3)
    # Deferred, a block leaves records to the next, and not always as many: a few blocks tell roughly.
    assert priced.compute_s == pytest.approx(made.tape.compute_s, rel=0.03 if defer else 1e-4)
    assert step.bound_s(plan, groups_of(plan, CLUSTER)) <= made.timeline.step_s


def test_an_sm_margin_reaches_its_products() -> None:
    plan = replace(PLAN, dp_shard=768)
    few = FewBlocks.build(BIG, plan, BatchShape(1, LATENT))
    models = PriceModels.of(CLUSTER)
    without = Extrapolation(few, plan, models)
    left = replace(plan, sm_margin=16)
    priced = without.price(left)
    assert priced == Extrapolation(few, left, models).price(left)
    assert priced.compute_s > 1.05 * without.price(plan).compute_s


# -- the planner ------------------------------------------------------------------------------------------------------


def request(**fixed: object) -> Request:
    return Request(
        config=BIG,
        buckets=(LatentBucket(LATENT, 1.0),),
        cluster=CLUSTER,
        gpus=256,
        fixed={"recompute": "full", **fixed},
    )


def test_the_planner_prices_it_when_it_is_fixed_and_leaves_it_off_else() -> None:
    asked, free = search(request(fused_tp=True, tp=4)), search(request(tp=4))
    assert all(choice.plan.fused_tp for choice in asked.choices)
    assert not any(choice.plan.fused_tp for choice in free.choices)
    assert asked.best.step_s < free.best.step_s, "what it hides is in the search's prices too"


def test_orders_and_degrees_that_leave_a_server_are_left_out() -> None:
    found = search(replace(request(fused_tp=True), shown=40))
    split = [choice.plan for choice in found.choices if choice.plan.tp > 1]
    assert len(split) > 5 and all(group_of(CLUSTER, plan, ("tp",)).domains == 1 for plan in split)
    wide = [refusal.reason for refusal in found.refused if refusal.family.tp == 16]
    assert len(wide) == 1 and "ranks 0, 1, 2" in wide[0] and "lie in 2 NVLink domains of 8 GPUs" in wide[0]


def test_pruning_finds_what_brute_force_finds() -> None:
    asked = request(fused_tp=True, prefetch=1)
    assert search(asked).best.plan == search(replace(asked, prune=False)).best.plan


def test_over_two_servers_it_is_refused_with_its_ranks() -> None:
    plan = replace(PLAN, tp=4, cp=8, order=("cp", "tp", "dp_shard", "dp_replicate"))
    with pytest.raises(CinemeshError, match="ranks 0, 8, 16, 24 of one tp group lie in 4 NVLink domains of 8 GPUs"):
        play_step(replace(BIG, layers=1), plan, BatchShape(1, LATENT), CLUSTER)
