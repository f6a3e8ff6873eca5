"""Every illegality of a plan is one message with its numbers; a plan survives YAML and the command line."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemesh.errors import CinemeshError
from cinemesh.kernels.ops import MOST_PLACES
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step, check
from cinemesh.parallel.ir.fields import AXES, MOST_RANKS
from cinemesh.parallel.ir.plan import Plan

degrees = st.integers(1, 64)
plans = st.builds(
    Plan,
    tp=degrees,
    cp=degrees,
    dp_shard=degrees,
    dp_replicate=degrees,
    micro_batches=degrees,
    recompute=st.sampled_from(["none", "selective", "full"])
    | st.lists(st.sampled_from("qkvo"), unique=True).map(tuple),
    dtype=st.sampled_from(["bf16", "float32", "float64"]),
    order=st.permutations(AXES).map(tuple),
    prefetch=st.integers(0, 5),
)


@given(plans)
def test_yaml_round_trip(plan: Plan) -> None:
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert Plan.from_dict(plan.to_dict()) == plan


@given(plans)
def test_equation_names_the_product(plan: Plan) -> None:
    factors = [int(n) for n in re.findall(r"\((\d+)\)", plan.equation())]
    product = 1
    for factor in factors:
        product *= factor
    assert product == plan.world_size == int(plan.equation().rpartition("= ")[2])
    plan.check_world_size(product)


@given(plans, st.integers(1, 4096))
def test_local_batch_times_its_parts_is_the_global_batch(plan: Plan, batch: int) -> None:
    parts = plan.dp_shard * plan.dp_replicate * plan.micro_batches
    if batch % parts:
        with pytest.raises(CinemeshError, match=rf"global batch\({batch}\) .* = {parts}\) = {batch % parts}, "):
            plan.local_batch(batch)
    else:
        assert plan.local_batch(batch) * parts == batch


def test_parse_reads_the_command_line() -> None:
    text = "tp=4,cp=2,dp_shard=96,recompute=q:kv,order=cp:tp:dp_shard:dp_replicate,prefetch=2"
    plan = Plan.parse(text, dtype="float32", tp=8)
    assert plan == Plan(
        tp=4,
        cp=2,
        dp_shard=96,
        recompute=("q", "kv"),
        order=("cp", "tp", "dp_shard", "dp_replicate"),
        prefetch=2,
        dtype="float32",
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan(tp=0), "plan: tp is 0; it must be a whole number of at least 1"),
        (lambda: Plan(cp=-2), "plan: cp is -2;"),
        (lambda: Plan.from_dict({"dp_shard": 1.5}), "plan: dp_shard is 1.5;"),
        (lambda: Plan.from_dict({"dp_replicate": True}), "plan: dp_replicate is True;"),
        (lambda: Plan.from_dict({"micro_batches": "two"}), "plan: micro_batches is 'two';"),
        (lambda: Plan(prefetch=-1), "plan: prefetch is -1; it must be a whole number of at least 0"),
        (lambda: Plan.from_dict({"dtype": "fp16"}), "plan: dtype is 'fp16'; choose one of bf16, float32, float64"),
        (lambda: Plan(recompute="some"), "plan: recompute is 'some'; choose one of none, selective, full"),
        (
            lambda: Plan(order=("tp", "cp", "tp", "dp_shard")),
            "it must name each of tp, cp, dp_shard, dp_replicate once",
        ),
        (lambda: Plan.from_dict({"tpp": 2}), "plan: unknown key 'tpp'; did you mean 'tp'?"),
        (lambda: Plan.parse("tp"), "plan: 'tp' is not key=value; write for example tp=4,cp=2,dp_shard=96"),
        (lambda: Plan.parse("tp=two"), "plan: tp is 'two';"),
        (lambda: Plan.from_yaml("- 1"), "plan: the plan there is [1]; it must be a mapping"),
        (lambda: Plan.from_yaml("tp: ["), "plan: the text is not valid YAML"),
        (
            lambda: Plan(tp=4, cp=2, dp_shard=96).check_world_size(512),
            "tp(4) * cp(2) * dp_shard(96) = 768 != world size 512; change the plan's degrees or launch 768 processes",
        ),
        (
            lambda: Plan(dp_replicate=3).check_world_size(2),
            "tp(1) * cp(1) * dp_shard(1) * dp_replicate(3) = 3 != world size 2",
        ),
        (
            lambda: Plan(dp_shard=2, micro_batches=3).local_batch(8),
            "global batch(8) % (dp_shard(2) * dp_replicate(1) * micro_batches(3) = 6) = 2",
        ),
        (lambda: Plan(dp_shard=2).local_batch(0), "global batch(0)"),
        (lambda: Plan(tp=2, tp_ctas=-1), "plan: tp_ctas is -1; it must be a whole number of at least 0"),
        (lambda: Plan(tp=2, tp_ctas=65), "plan: tp_ctas(65) > 64, the thread blocks that NCCL gives a collective"),
        (lambda: Plan(tp=2, cp_ctas=4), "plan: cp_ctas(4) with cp(1): one rank has no collective there"),
        (lambda: Plan(tp_ctas=4), "nothing would change; set tp_ctas to 0 or raise tp"),
        (lambda: Plan(tp=2, unit_ctas=4), "unit_ctas(4) with dp_shard(1), cp(1): one rank has no collective there"),
        (lambda: Plan(sm_margin=4), "plan: sm_margin(4) with tp(1) * cp(1) * dp_shard(1) = 1: one rank does not"),
        (
            lambda: Plan(tp=2, normal_priority=("unit",)),
            "normal_priority(unit) with dp_shard(1), cp(1): one rank has no collective there, so nothing would change; "
            "take unit out of normal_priority or raise dp_shard or cp",
        ),
        (lambda: Plan(tp=2, normal_priority=("dp",)), "normal_priority names 'dp'; choose from tp, cp, unit"),
        (lambda: Plan(tp=2, normal_priority=("tp", "tp")), "list some of tp, cp, unit, each once"),
        (lambda: Plan.from_dict({"tp": 2, "normal_priority": "tp"}), "plan: normal_priority is 'tp'; list some of"),
        (
            lambda: Plan(tp=2, sm_margin=132).check_device("H100", 132),
            "plan: sm_margin(132) leaves none of the 132 SMs of H100 to compute; use 131 or fewer",
        ),
        (lambda: Plan(tp=2, tp_ctas=20).check_device("a small one", 20), "tp_ctas(20) leaves none of the 20 SMs"),
        (
            lambda: check(preset("tiny"), Plan(micro_batches=2), BatchShape(MOST_PLACES // 2 + 1, (2, 4, 4))),
            f"= {MOST_PLACES + 2} > {MOST_PLACES}, the places of a step's global batch that draws can tell apart",
        ),
        (lambda: Plan(tp=2, dp_shard=MOST_RANKS), f"> {MOST_RANKS}, more ranks than any cluster has GPUs"),
    ],
)
def test_illegal_plans_say_why(make: Any, message: str) -> None:
    with pytest.raises(CinemeshError, match=re.escape(message)):
        make()


def test_what_is_just_legal_is_taken() -> None:
    Plan(tp=2, tp_ctas=19).check_device("a small one", 20)
    assert Plan(tp=2, dp_shard=MOST_RANKS // 2).world_size == MOST_RANKS
    assert Plan(dp_shard=2, micro_batches=3).local_batch(6) == 1 == Plan().local_batch(1)
    check(preset("tiny"), Plan(micro_batches=2), BatchShape(MOST_PLACES // 2, (2, 4, 4)))


STREAMS_SET = Plan(
    tp=2, cp=2, dp_shard=2, tp_ctas=8, cp_ctas=4, unit_ctas=2, sm_margin=16, normal_priority=("tp", "cp", "unit")
)


def test_parse_reads_what_is_set_of_the_streams() -> None:
    text = "tp=2,cp=2,dp_shard=2,tp_ctas=8,cp_ctas=4,unit_ctas=2,sm_margin=16,normal_priority=tp:cp:unit"
    assert Plan.parse(text) == STREAMS_SET == Plan.from_yaml(STREAMS_SET.to_yaml())
    assert STREAMS_SET.streams == text.split(",")[3:]
    assert Plan(tp=2).streams == []


@given(degrees, degrees, degrees, degrees)
def test_other_degrees_drop_what_no_collective_has_there(tp: int, cp: int, dp_shard: int, dp_replicate: int) -> None:
    plan = STREAMS_SET.with_degrees(tp=tp, cp=cp, dp_shard=dp_shard, dp_replicate=dp_replicate)
    left = {"tp": tp > 1, "cp": cp > 1, "unit": dp_shard * cp > 1}
    assert plan.normal_priority == tuple(name for name, there in left.items() if there)
    assert (plan.tp_ctas, plan.cp_ctas, plan.unit_ctas) == (8 * left["tp"], 4 * left["cp"], 2 * left["unit"])
    assert plan.sm_margin == (16 if plan.world_size > 1 else 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(tp=5), "heads(48) % tp(5) = 3, it must be 0; choose a tp that divides the heads"),
        (Plan(tp=3), "ffn(16384) % tp(3) = 1, it must be 0"),
        (Plan(cp=5), "tokens of a 32x96x96 latent(73728) % (cp(5) * tp(1) = 5) = 3, it must be 0"),
        (Plan(tp=16, cp=7), "(cp(7) * tp(16) = 112)"),
    ],
)
def test_a_model_that_the_degrees_do_not_divide_is_refused(plan: Plan, message: str) -> None:
    name = "movie-gen-30b"
    for refuse in (check, build_step):  # by itself, and before a single record is built
        with pytest.raises(CinemeshError, match=re.escape(message)):
            refuse(preset(name), plan, BatchShape(1, USUAL_LATENTS[name]))


def test_text_width_must_divide() -> None:
    with pytest.raises(CinemeshError, match=re.escape("width of text encoder metaclip(1280) % tp(3) = 2")):
        Plan(tp=3).check_model(heads=6, ffn=96, tokens=36, text_widths={"ul2": 24, "metaclip": 1280}, latent="1x1x1")


def test_degrees_need_not_be_powers_of_two() -> None:
    check(preset("movie-gen-30b"), Plan(tp=4, cp=9, dp_shard=13), BatchShape(1, USUAL_LATENTS["movie-gen-30b"]))
