"""A whole step priced from a few blocks, against the whole step built and played."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cinemesh.kernels.ops import OPS
from cinemesh.memory import uncollected
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step, unit_layout
from cinemesh.parallel.ir.flops import hardware_flops
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Op
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.footprint import outside
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.prices.network import groups_of
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.search.evaluator import BOUND_SLACK, Evaluator
from cinemesh.perf_model.search.extrapolate import Extrapolation
from cinemesh.perf_model.search.few_blocks import PROVEN_BLOCKS, FewBlocks, Programs, canonical, overlaps
from cinemesh.perf_model.search.lower_bound import LowerBound
from cinemesh.perf_model.search.planner import search
from cinemesh.perf_model.search.request import LatentBucket, PricedPlan, Request, Timed
from cinemesh.perf_model.search.unroll import NotSteady

CLUSTER = load("grand-teton-h100", packages="fa3")  # whose kernels can leave SMs alone
MODELS = PriceModels.of(CLUSTER)
BIG = preset("movie-gen-30b")
LATENT = (32, 96, 96)
OWN = 1e-3  # of the whole step: a plan's own few blocks; some records over the flat shard are rounded otherwise

MIXED: dict[str, Any] = {"recompute": ("o", "lse"), "recompute_last": "selective", "last_blocks": 42}
PLANS = [
    Plan(tp=4, cp=2, dp_shard=768, recompute="full"),
    Plan(tp=4, cp=1, dp_shard=1536, recompute="full", grad_units=2),
    Plan(tp=2, cp=6, dp_shard=32, dp_replicate=16, grad_units=2, order=("cp", "tp", "dp_shard", "dp_replicate")),
    Plan(tp=2, cp=6, dp_shard=512, grad_units=2, kv_slices=2, tp_slices=2, defer_weight_gradients=True),
    Plan(tp=4, cp=8, dp_shard=12, dp_replicate=16, grad_units=2, kv_chunks=6, kv_first=True, tp_slices=4),
    Plan(tp=1, cp=12, dp_shard=512, grad_units=2, prefetch=2),
    Plan(tp=2, cp=6, dp_shard=16, dp_replicate=32, grad_units=2, recompute_last="none", last_blocks=12),
    # Between the two modes a gather is waited for before one that was issued earlier.
    Plan(tp=2, cp=4, dp_shard=64, grad_units=2, tp_slices=4, defer_weight_gradients=True, **MIXED),
    replace(
        Plan(tp=1, cp=4, dp_shard=128, dp_replicate=12, grad_units=2, offload=("kv", "q", "gate", "up", "y3")),
        **{"recompute_last": "selective", "last_blocks": 6},
    ),
]


def _proven(plan: Plan) -> Extrapolation:
    """Of a few blocks, or of some more where no two of these are alike; these last ones do."""
    few, more = (FewBlocks.proven(BIG, plan, BatchShape(1, LATENT), blocks) for blocks in PROVEN_BLOCKS)
    assert few.blocks < more.blocks < BIG.layers
    step = Extrapolation(few, plan, MODELS)
    with contextlib.suppress(NotSteady):
        step.unrolled(plan)
        return step
    return Extrapolation(more, plan, MODELS)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"tp{plan.tp}cp{plan.cp}x{plan.last_blocks}")
def test_a_few_blocks_say_what_the_whole_48_layers_take(plan: Plan) -> None:
    """Only this catches a block counted twice or left out, and lanes that are not steady yet."""
    step = _proven(plan)
    priced = step.price(plan)
    deep = play_step(BIG, plan, BatchShape(1, LATENT), CLUSTER)
    assert priced.step_s == pytest.approx(deep.timeline.step_s, rel=OWN)
    assert priced.compute_s == pytest.approx(deep.tape.compute_s, rel=1e-3)
    assert priced.exposed_s == pytest.approx(deep.timeline.total_exposed_s, abs=OWN * deep.timeline.step_s)
    assert step.hardware_flops(plan) == hardware_flops(deep.program)
    own = deep.footprint.peak_bytes - sum(deep.footprint.by_class.get(name, 0) for name in outside(CLUSTER, plan))
    # 100 MB of 66 GB: where the order differs, one gathered K or V may live a little longer.
    assert step.peak_bytes(plan) == pytest.approx(own, abs=1e8)
    assert step.host_bytes(plan) == deep.footprint.host_bytes


def test_eight_micro_batches_take_what_a_few_of_them_say() -> None:
    """Only this catches a micro-batch counted twice, and sums over replicas that all wait for the last one."""
    model = replace(BIG, layers=10)
    plan = Plan(dp_shard=64, dp_replicate=2, micro_batches=8, grad_units=2)
    few = FewBlocks.proven(model, plan, BatchShape(1, (1, 32, 32)))
    assert few.plan.micro_batches < 8
    priced = Extrapolation(few, plan, MODELS).price(plan)
    deep = play_step(model, plan, BatchShape(1, (1, 32, 32)), CLUSTER)
    assert priced.step_s == pytest.approx(deep.timeline.step_s, rel=OWN)


def test_sums_that_queue_behind_compute_are_all_waited_for() -> None:
    """Images on slow NICs: 48 sums over replicas queue, each longer than a block, and the step ends with the last."""
    plan = Plan(dp_shard=8, dp_replicate=64, grad_units=2, recompute="none")
    slow = CLUSTER.with_(nic_scale=0.1)
    batch = BatchShape(2, (1, 32, 32))
    deep = play_step(BIG, plan, batch, slow)
    assert deep.timeline.step_s > 2 * deep.tape.compute_s
    priced = Extrapolation(FewBlocks.proven(BIG, plan, batch), plan, PriceModels.of(slow)).price(plan)
    assert priced.step_s == pytest.approx(deep.timeline.step_s, rel=OWN)
    assert priced.exposed_s == pytest.approx(deep.timeline.total_exposed_s, rel=OWN)


ANY_PLAN = st.tuples(
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((1, 2, 3, 4)),
    st.sampled_from((1, 8, 96)),
    st.sampled_from((1, 2, 16)),
    st.sampled_from((("none", None, 0), ("selective", None, 0), ("full", None, 0), ("selective", "none", 3))),
)


@settings(max_examples=4, deadline=None)
@given(
    ANY_PLAN,
    st.sampled_from(((1, 16, 16), (1, 32, 32), (32, 32, 32), (32, 96, 96), (128, 136, 240))),
    st.sampled_from((1, 4, 32)),
    st.floats(0.05, 16.0),
    st.booleans(),
)
def test_a_plans_own_blocks_agree_with_the_whole_on_any_network(
    degrees: tuple[int, int, int, int, tuple[str, str | None, int]],
    latent: tuple[int, int, int],
    samples: int,
    nic: float,
    gloo: bool,
) -> None:
    """From 256 tokens to a million, NICs a twentieth to sixteen times as fast, gloo and NCCL; bounds stay below."""
    tp, cp, shards, replicas, (recompute, last, last_blocks) = degrees
    cluster = load("local-cpu") if gloo else CLUSTER.with_(nic_scale=nic)
    model = replace(BIG, layers=20, position_lengths=(128, 128, 128))
    mixed = {"recompute": recompute, "recompute_last": last, "last_blocks": last_blocks}
    base = Plan(tp=2, cp=2, dp_shard=2, grad_units=2, **mixed)
    plan = base.with_degrees(tp=tp, cp=cp, dp_shard=shards, dp_replicate=replicas)
    assume(model.tokens(latent) % (tp * cp) == 0)
    step = Extrapolation(FewBlocks.proven(model, plan, BatchShape(samples, latent)), plan, PriceModels.of(cluster))
    deep = play_step(model, plan, BatchShape(samples, latent), cluster).timeline.step_s
    try:
        assert step.price(plan).step_s == pytest.approx(deep, rel=OWN)
        assert step.bound_s(plan, groups_of(plan, cluster)) <= deep * (1.0 + BOUND_SLACK)
    except NotSteady:  # then the whole step is played
        assume(False)


def test_a_bound_above_the_step_is_told() -> None:
    """It is an error here, as every warning is, and a line on stderr in use."""
    request = Request(preset("tiny"), (LatentBucket((2, 8, 8)),), CLUSTER, 4)
    choice = search(request).best
    with pytest.warns(UserWarning, match="was taken to be"):
        Evaluator(request).settled(replace(choice, bound_s=2 * choice.step_s))


DEGREES = st.tuples(st.sampled_from((1, 2, 4, 8, 16)), st.sampled_from((1, 2, 3, 4, 6, 8, 12)))


@settings(max_examples=8, deadline=None)
@given(DEGREES, st.sampled_from(("none", "selective", "full")))
def test_one_program_serves_all_degrees(degrees: tuple[int, int], recompute: str) -> None:
    """``FewBlocks.on`` against a fresh build: the local bytes of every buffer, and so every price and peak.

    Alone the zeroing of alignment gaps comes and goes with tp: some kilobytes of a flat gradient.
    """
    tp, cp = degrees
    model = replace(BIG, layers=4)
    base = Plan(tp=2, cp=2, dp_shard=2, recompute=recompute)
    plan = base.with_degrees(tp=tp, cp=cp)
    moved = FewBlocks.build(model, base, BatchShape(1, LATENT)).on(plan)
    fresh = FewBlocks.build(model, plan, BatchShape(1, LATENT))
    assert not [n for n in {*moved.program.buffers} ^ {*fresh.program.buffers} if "gradient/" not in n]
    for name in {*moved.program.buffers} & {*fresh.program.buffers}:
        assert moved.program.local_shape(name) == fresh.program.local_shape(name), name
    assert moved.units.flat_elements == fresh.units.flat_elements == unit_layout(model, fresh.plan).flat_elements


STREAM_SETTINGS = st.fixed_dictionaries(
    {
        "tp_ctas": st.sampled_from((0, 1, 8, 32)),
        "cp_ctas": st.sampled_from((0, 2, 64)),
        "unit_ctas": st.sampled_from((0, 1, 4, 24)),
        "sm_margin": st.sampled_from((0, 8, 24, 64)),
        "normal_priority": st.sampled_from(((), ("unit",), ("tp", "cp"), ("tp", "cp", "unit"))),
    }
)


@settings(max_examples=10, deadline=None)
@given(DEGREES, st.sampled_from((1, 2, 8, 64)), st.sampled_from(("none", "selective", "full")), STREAM_SETTINGS)
def test_no_step_is_shorter_than_its_bounds(
    degrees: tuple[int, int], shards: int, recompute: str, streams: dict[str, Any]
) -> None:
    """The bounds that prune: of a family before it is built, and of a variant before it is played."""
    tp, cp = degrees
    base = Plan(tp=2, cp=2, dp_shard=2, grad_units=2, **streams)
    plan = replace(base, recompute=recompute).with_degrees(tp=tp, cp=cp, dp_shard=shards, dp_replicate=2)
    alone = shards * cp == 1
    model = base.with_degrees(cp=1, dp_shard=1) if alone else base
    few = FewBlocks.build(BIG, model, BatchShape(1, LATENT)).on(plan)
    step = Extrapolation(few, plan, MODELS)
    step_s = step.price(plan).step_s
    assert step.bound_s(plan, groups_of(plan, CLUSTER)) <= step_s * (1 + 1e-9)
    least = LowerBound(FewBlocks.build(BIG, base, BatchShape(1, LATENT)), MODELS)
    somewhere, placed = (least.step_s(recompute, plan, groups) for groups in (None, groups_of(plan, CLUSTER)))
    assert somewhere <= placed * (1 + 1e-9) <= step_s * (1 + 2e-9)
    assert least.peak_bytes(recompute, plan) <= step.peak_bytes(plan)


@settings(max_examples=10, deadline=None)
@given(STREAM_SETTINGS, STREAM_SETTINGS)
def test_other_stream_settings_need_no_other_program(built: dict[str, Any], asked: dict[str, Any]) -> None:
    """Priced on the records of another setting, a plan takes as long as on its own, and has the same bound."""
    model = replace(BIG, layers=12)
    plan = Plan(tp=4, cp=2, dp_shard=96, dp_replicate=8, recompute="full", grad_units=2, tp_slices=2)
    first, wanted = replace(plan, **built), replace(plan, **asked)
    few = FewBlocks.build(model, first, BatchShape(1, LATENT))
    moved = Extrapolation(few, first, MODELS)
    before = moved.price(first)
    fresh = Extrapolation(FewBlocks.build(model, wanted, BatchShape(1, LATENT)), wanted, MODELS)
    assert moved.price(wanted) == fresh.price(wanted)
    groups = groups_of(wanted, CLUSTER)
    assert moved.bound_s(wanted, groups) == fresh.bound_s(wanted, groups)
    assert moved.peak_bytes(wanted) == fresh.peak_bytes(wanted)
    assert moved.price(first) == before


UNPADDED = st.tuples(st.sampled_from((1, 2, 4)), st.sampled_from((1, 2, 3, 6)))  # beyond, units have gaps to zero
PARTS = ({}, {"tp_slices": 2}, {"kv_slices": 3}, {"kv_chunks": 2, "tp_slices": 4})


@settings(max_examples=8, deadline=None)
@given(UNPADDED, UNPADDED, st.sampled_from(("none", "full")), st.sampled_from(PARTS))
def test_records_arranged_for_other_degrees_run_in_the_order_of_their_own(
    first: tuple[int, int], degrees: tuple[int, int], recompute: str, parts: dict[str, Any]
) -> None:
    """Places in storages move with the degrees: where one stays, views seem to overlap and hold records back."""
    base = Plan(tp=2, cp=2, dp_shard=2, grad_units=2, recompute=recompute, recompute_last="selective", last_blocks=4)
    plans = [replace(base, **parts).with_degrees(tp=tp, cp=cp) for tp, cp in (first, degrees)]
    assume(overlaps(plans[0]) == overlaps(plans[1]))  # degrees of one drop some: then another program serves
    shared = FewBlocks.build(BIG, replace(base, **overlaps(plans[1])), BatchShape(1, LATENT))
    _, moved = (shared.on(plan).prepared(plan, "nccl") for plan in plans)
    own = FewBlocks.build(BIG, plans[1], BatchShape(1, LATENT))
    program = prepare(replace(own.program, plan=own.under(plans[1])), backend="nccl")
    assert [op.name for op in moved.ops] == [op.name for op in program.ops]
    assert {name: moved.span(name) for name in moved.buffers} == {name: program.span(name) for name in program.buffers}


@pytest.mark.parametrize("order", [{"kv_first": True}, {"defer_weight_gradients": True}])
def test_knobs_of_the_order_are_all_the_same_to_a_builder(order: dict[str, Any]) -> None:
    """What was built without them runs in the order of what is built with them."""
    plain = Plan(tp=2, cp=2, dp_shard=2, grad_units=2, kv_chunks=2, recompute="full")
    plan, batch, programs = replace(plain, **order), BatchShape(1, LATENT), Programs()
    before, shared = (programs.shared(BIG, one, batch) for one in (plain, plan))
    assert shared.built is before.built
    assert shared.under(plan) == canonical(plan)
    built = build_step(replace(BIG, layers=shared.blocks), canonical(plan), batch)
    with_them, without = prepare(built, backend="nccl"), before.prepared(plain, "nccl")
    ran = [op.name for op in shared.prepared(plan, "nccl").ops]
    assert ran == [op.name for op in with_them.ops]
    assert ran != [op.name for op in without.ops]


def test_what_is_built_goes_with_the_last_that_needs_it() -> None:
    """A cycle would keep a million records of a search until Python looks for garbage: for a tenth of its time."""
    plan = Plan(tp=2, cp=2, dp_shard=2, grad_units=2)
    few = FewBlocks.build(BIG, plan, BatchShape(1, LATENT))
    few.on(plan.with_degrees(tp=4)).prepared(plan.with_degrees(tp=4), "nccl")
    built = weakref.ref(few.built)
    with uncollected():
        del few
        assert built() is None


SHARDS = st.tuples(st.sampled_from((2, 48, 64, 96, 768)), st.sampled_from((1, 6, 8)))


@settings(max_examples=10, deadline=None)
@given(st.tuples(UNPADDED, SHARDS), st.tuples(UNPADDED, SHARDS), st.sampled_from(PARTS), st.sampled_from((1, 3)))
def test_a_plans_own_program_is_the_same_moved_or_built(
    first: tuple[tuple[int, int], tuple[int, int]],
    degrees: tuple[tuple[int, int], tuple[int, int]],
    parts: dict[str, Any],
    micro_batches: int,
) -> None:
    """Every record and every buffer, but for attributes that no price reads: else a plan is priced as another one."""
    base = Plan(tp=2, cp=2, dp_shard=2, grad_units=2, micro_batches=micro_batches, **parts)
    one, other = (
        base.with_degrees(tp=tp, cp=cp, dp_shard=shards, dp_replicate=replicas)
        for (tp, cp), (shards, replicas) in (first, degrees)
    )
    assume(overlaps(one) == overlaps(other))
    fresh = FewBlocks.proven(BIG, one, BatchShape(3, LATENT))
    assume(fresh.zeroes(other))
    moved, built = fresh.on(other, 2), FewBlocks.proven(BIG, other, BatchShape(2, LATENT))
    assert moved.units == built.units
    assert _known(moved.program) == _known(built.program)


def _known(program: Program) -> tuple[object, object]:
    """Buffers and records by what they touch: a gradient without gaps has no second name, as which it is zeroed."""

    def read(op: Op) -> Op:
        counted = ("signature", *(OPS[op.kind].counted if op.kind in OPS else ()))
        touched: Any = [tuple(map(program.span, names)) for names in (op.inputs, op.outputs)]
        attrs = {name: op.attrs[name] for name in counted if name in op.attrs}
        return replace(op, inputs=touched[0], outputs=touched[1], attrs=attrs)

    named = {name: buffer for name, buffer in program.buffers.items() if buffer.role != "zeroed"}
    places = {name: (replace(buffer, base=None, offset=0), program.span(name)) for name, buffer in named.items()}
    return places, list(map(read, program.ops))


def test_padding_that_comes_is_another_program_and_padding_that_goes_is_none() -> None:
    """256 ranks share a block without padding, 768 do not: gaps are zeroed then, by records that others go without."""
    plans = [Plan(tp=2, cp=4, dp_shard=n, dp_replicate=3, grad_units=2) for n in (64, 256)]
    batch, programs = BatchShape(1, LATENT), Programs()
    few, padded = (FewBlocks.proven(BIG, plan, batch) for plan in plans)
    assert few.zeroes(replace(plans[0], dp_shard=96)) and not few.zeroes(plans[1]) and padded.zeroes(plans[0])
    assert _known(padded.on(plans[0]).program) == _known(few.program) != _known(padded.program)
    prepared = [one.prepared(plans[0], "nccl") for one in (padded.on(plans[0]), few)]
    assert _known(prepared[0]) == _known(prepared[1])
    first, other, again = (programs.own(BIG, plan, batch, 4) for plan in (*plans, plans[0]))
    assert first is again and len(other.program.ops) > len(first.program.ops)


def test_units_of_one_size_move_to_sizes_of_their_own() -> None:
    """Padded for 128 ranks a tiny block is as large as all that is replicated; two ranks of tp halve it."""
    tiny, batch = preset("tiny"), BatchShape(6, (3, 4, 12))
    one, two = (Plan(tp=tp, dp_shard=128 // tp, dp_replicate=16, grad_units=2) for tp in (1, 2))
    first, built = (FewBlocks.proven(tiny, plan, batch) for plan in (one, two))
    assert len({unit.elements for unit in first.units.units}) < len({unit.elements for unit in built.units.units})
    assert first.zeroes(two) and first.on(two).program.buffers == built.program.buffers


def test_a_program_of_one_rank_serves_no_group() -> None:
    """A unit that is never gathered has other records than one that is."""
    few = FewBlocks.build(BIG, Plan(dp_replicate=2), BatchShape(1, LATENT))
    with pytest.raises(ValueError, match="cannot serve"):
        few.on(Plan(dp_shard=2, dp_replicate=2))


def test_a_plans_own_blocks_serve_other_stream_settings() -> None:
    """The evaluator keeps the last plan's: under other thread blocks and priorities they tell the whole step."""
    request = Request(replace(BIG, layers=24), (LatentBucket(LATENT),), CLUSTER, 768)
    evaluator, plan = Evaluator(request), Plan(tp=4, cp=2, dp_shard=96, recompute="full", tp_slices=2)
    for changes in ({}, {"tp_ctas": 4, "sm_margin": 8}, {"normal_priority": ("unit",)}, {"grad_units": 2}):
        changed = replace(plan, **changes)
        told = evaluator.settled(PricedPlan(changed, 1, 0.0, 0.0, 0.0, 0, changed.data_ranks))
        whole = play_step(request.config, changed, BatchShape(1, LATENT), CLUSTER)
        assert told.timed is Timed.STEADY
        assert told.step_s == pytest.approx(whole.step_s, rel=1e-3)


def test_degree_one_axes_cost_nothing() -> None:
    plan = Plan(tp=1, cp=1, dp_shard=1, dp_replicate=1, recompute="full")
    program = build_step(replace(preset("tiny"), layers=2), plan, BatchShape(1, (2, 4, 4)))
    assert any(op.comm is not None for op in program.ops)
    played = play_step(preset("tiny"), plan, BatchShape(1, (2, 4, 4)), CLUSTER)
    assert played.timeline.total_exposed_s == 0.0
    assert played.timeline.step_s == pytest.approx(played.tape.compute_s, rel=1e-12)
