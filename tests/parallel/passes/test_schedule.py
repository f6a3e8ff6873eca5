"""The schedule pass: it keeps what must be kept, bounds what is alive, and hides what it was asked to hide.

That the numbers stay right: tests/model/test_parity.py. Only this shows that an overlap happens, by the start rule.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.communicators import communicator
from cinemesh.parallel.ir.dependencies import dependencies
from cinemesh.parallel.ir.flops import hardware_flops
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Op, Phase
from cinemesh.parallel.passes.elide import elide
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.passes.prefetch import prefetch
from cinemesh.parallel.passes.prices import RATES, Price
from cinemesh.parallel.passes.recompute import rematerialize
from cinemesh.parallel.passes.schedule import ScheduleWindows
from cinemesh.parallel.runtime import ledger

default_price = RATES["nccl"].price
ALL = "tp=2,cp=2,dp_shard=2,kv_slices=3,tp_slices=3,defer_weight_gradients=true,grad_units=2"
PLANS = (
    "cp=2,kv_slices=3",
    "tp=2,tp_slices=3,recompute=full,micro_batches=2",
    "cp=3,dp_shard=2,defer_weight_gradients=true,grad_units=3,micro_batches=2,recompute=none",
    "cp=2,kv_slices=2,recompute=kv_gathered:lse:o",
    "cp=2,dp_shard=2,kv_chunks=3,kv_first=true,grad_units=2,prefetch=2",
    "tp=2,cp=2,kv_chunks=2,tp_slices=2,defer_weight_gradients=true,recompute=full,micro_batches=2",
    ALL,
    f"{ALL},recompute=full,recompute_last=selective,last_blocks=2,prefetch=2",
)


@lru_cache
def before(text: str, layers: int = 5) -> Program:
    plan = Plan.parse(text, dtype="float32")
    case = small_case(plan, max_procs=16)
    return elide(prefetch(rematerialize(build_step(replace(case.config, layers=layers), plan, case.batch))))


def overlap(program: Program, price: Price = default_price) -> Program:
    return ScheduleWindows(program).ordered(program, price)


def even(program: Program, op: Op) -> float:
    """Prices at which a slice travels while another is computed."""
    return 0.9 if op.is_issue else 1.0


@pytest.mark.parametrize("text", PLANS)
def test_it_moves_records_and_keeps_what_depends_on_what(text: str) -> None:
    old, new = before(text), overlap(before(text))
    assert sorted(op.name for op in new.ops) == sorted(op.name for op in old.ops)
    assert [op.name for op in new.ops] != [op.name for op in old.ops]
    position = {op.name: i for i, op in enumerate(new.ops)}
    for op, needed in zip(old.ops, dependencies(old, old.ops), strict=True):
        assert all(position[old.ops[k].name] < position[op.name] for k in needed), op.name
    sent = [sorted(map(str, ledger.expected(program))) for program in (old, new)]
    assert sent[0] == sent[1]


ORDER = """
import sys
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.ir.plan import Plan
program = prepare(build_step(preset("tiny-video"), Plan.parse(sys.argv[1]), BatchShape(1, (2, 16, 16))), backend="nccl")
print(*(op.name for op in program.ops))
"""


def test_it_is_the_same_in_every_process() -> None:
    """Ranks are processes, with hash seeds of their own: no set or hash may decide."""
    text = "tp=2,cp=2,dp_shard=2,kv_slices=3,tp_slices=2,grad_units=2,defer_weight_gradients=true,recompute=full"
    found = [
        subprocess.run(
            [sys.executable, "-c", ORDER, text],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] and len(found[0].split()) > 500


def test_equal_blocks_get_equal_orders() -> None:
    new = overlap(before(ALL, layers=7))
    orders: dict[int, list[tuple[object, ...]]] = defaultdict(list)
    for op in new.ops:
        if op.place.block is not None:
            orders[op.place.block].append((op.place.phase, op.label, op.kind, op.clone))
    assert orders[2] == orders[3] == orders[4]


def most_alive(program: Program, kind: str, lane: str) -> int:
    """Results of gathers, or inputs of reductions, that are alive at once."""
    lives = lifetimes(program)
    ops = [op for op in program.ops if (op.kind, op.lane) == (kind, lane)]
    roots = {program.root(op.outputs[0] if kind == "all_gather" else op.inputs[0])[0] for op in ops}
    alive, most = 0, 0
    for allocated, freed in zip(lives.allocate, lives.free, strict=True):
        alive += len(roots & set(allocated))
        most = max(most, alive)
        alive -= len(roots & set(freed))
    return most


@pytest.mark.parametrize("prefetched", [0, 1, 2])
@pytest.mark.parametrize("units", [1, 2, 3])
def test_what_lives_at_once_is_bounded(prefetched: int, units: int) -> None:
    text = f"cp=2,dp_shard=2,kv_slices=3,prefetch={prefetched},grad_units={units},defer_weight_gradients=true"
    program = overlap(before(text))
    assert most_alive(program, "all_gather", "dp_shard*cp") == prefetched + 1
    assert most_alive(program, "reduce_scatter", "dp_shard*cp") == units
    assert most_alive(program, "all_gather", "cp") == 2
    assert most_alive(program, "reduce_scatter", "cp") <= 2


# -- what runs beside what --------------------------------------------------------------------------------------------


def beside(program: Program, issue: str) -> list[str]:
    """Roles of the compute between a collective's issue and its wait."""
    names = [op.name for op in program.ops]
    inside = program.ops[names.index(issue) + 1 : names.index(f"{issue}.wait")]
    return [op.label for op in inside if op.lane == "compute"]


def test_the_next_slice_of_keys_and_values_travels_while_attention_runs_on_this_one() -> None:
    program = overlap(before("cp=2,kv_slices=3"), even)
    for i in (1, 2):
        assert f"o.h{i - 1}" in beside(program, f"mb0/blocks.1.forward/kv_gathered.h{i}")
        assert f"dq.h{i}" in beside(program, f"mb0/blocks.1.backward/dkv_slice.h{i - 1}")
    again = [op for op in program.ops if op.place.block == 1 and op.role == "kv_gathered" and op.slice and op.clone]
    assert len(again) == 2 * 3, "gathered again: three issues and three waits"


def test_the_next_chunk_of_keys_and_values_travels_while_attention_runs_on_this_one() -> None:
    """dK and dV of a chunk are whole once all queries have seen it: they are reduced beside the next chunk."""
    program = overlap(before("cp=2,kv_chunks=3"), even)
    for i in (1, 2):
        assert f"o_of.c{i - 1}" in beside(program, f"mb0/blocks.1.forward/kv_gathered.c{i}")
        assert f"dq_of.c{i}" in beside(program, f"mb0/blocks.1.backward/dkv.c{i - 1}")


def test_a_chunk_leaves_as_soon_as_its_tokens_are_projected() -> None:
    """Token slices of the projection and token chunks of what it makes: the first need not wait for the last."""
    program = overlap(before("tp=2,cp=2,kv_chunks=3,tp_slices=3"), even)
    names = [op.name for op in program.ops]
    first, last = names.index("mb0/blocks.1.forward/kv_gathered.c0"), names.index("mb0/blocks.1.forward/kv.t2")
    assert first < last


def test_units_wait_for_keys_and_values_when_asked() -> None:
    """The gather of the next block's unit would else start before all of this block's K and V is on its way."""
    text = "cp=2,dp_shard=2,kv_chunks=3,grad_units=2"
    orders: list[bool] = []
    for asked in ("false", "true"):
        names = [op.name for op in overlap(before(f"{text},kv_first={asked}"), even).ops]
        unit, last = names.index("mb0/blocks.3.weights/flat"), names.index("mb0/blocks.2.forward/kv_gathered.c2")
        assert unit < names.index("mb0/blocks.3.weights/flat.wait")
        orders.append(unit > last)
    assert orders == [False, True]


def test_a_reduction_goes_between_the_keys_and_values_that_come_first() -> None:
    """``kv_first`` holds back the gathers of units alone."""
    names = [op.name for op in overlap(before("cp=2,dp_shard=2,kv_chunks=3,grad_units=2,kv_first=true")).ops]
    for block in (3, 2, 1):
        first, last = (names.index(f"mb0/blocks.{block}.forward/kv_gathered.c{i}~") for i in (0, 2))
        assert first < names.index(f"mb0/blocks.{block + 1}.backward/reduced") < last
        assert last < names.index(f"mb0/blocks.{block - 1}.weights/flat~")


def test_kept_keys_and_values_are_not_gathered_again() -> None:
    program = overlap(before("cp=2,kv_slices=2,recompute=kv_gathered:lse:o"))
    assert not [op for op in program.ops if op.clone and op.lane == "cp"]


def test_token_slices_travel_beside_the_product_of_another() -> None:
    program = overlap(before("tp=2,tp_slices=3"), even)
    forward, backward = "mb0/blocks.1.forward", "mb0/blocks.1.backward"
    for i in (1, 2):
        assert f"gate.t{i - 1}" in beside(program, f"{forward}/h2_gathered.t{i}")
        assert f"dact.t{i - 1}" in beside(program, f"{backward}/dy3_gathered.t{i}")
        assert f"y3_partial.t{i}" in beside(program, f"{forward}/y3.t{i - 1}")
        assert f"dh2_gathered.t{i}" in beside(program, f"{backward}/dh2.t{i - 1}")


@pytest.mark.parametrize("text", ["dp_replicate=3", "cp=2,dp_shard=2,dp_replicate=2,micro_batches=2"])
def test_units_are_summed_over_replicas_behind_compute(text: str) -> None:
    """Unit by unit, as many bytes as in one piece; only what is reduced last has nothing left to hide behind."""
    whole, units = (overlap(before(f"{text}{more}")) for more in ("", ",grad_units=2"))
    sums = [op for op in units.ops if op.is_issue and op.lane == "dp_replicate"]
    (once,) = [op for op in whole.ops if op.is_issue and op.lane == "dp_replicate"]
    assert sum(units.payload_bytes(op) for op in sums) == whole.payload_bytes(once)
    hidden = [op for op in sums if len(beside(units, op.name)) > 10]
    assert {(op.place.block, op.place.phase) for op in hidden} >= {(layer, Phase.BACKWARD) for layer in (4, 3, 2, 1)}


def test_weight_gradients_move_into_the_shadow_only_when_asked() -> None:
    """In the order of the builder dy2's gather has nothing beside it: what follows needs it."""
    shadow = {}
    for asked in ("false", "true"):
        program = overlap(before(f"tp=2,tp_slices=3,defer_weight_gradients={asked}"))
        shadow[asked] = beside(program, "mb0/blocks.1.backward/dy2_gathered.t0")
    assert not any(name.endswith("_weight") for name in shadow["false"])
    assert any(name.endswith("_weight") for name in shadow["true"])


def test_a_unit_is_reduced_beside_the_backward_of_the_next() -> None:
    program = overlap(before("dp_shard=2,grad_units=2"))
    assert "dq" in beside(program, "mb0/blocks.3.backward/reduced")
    assert beside(before("dp_shard=2,grad_units=2"), "mb0/blocks.3.backward/reduced") == []


# -- the 30B step -----------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """Seconds by the start rule."""

    step_s: float = 0.0
    compute_s: float = 0.0
    exposed_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def exposed(self) -> float:
        return 1 - self.compute_s / self.step_s


def play(program: Program) -> Played:
    """A second, small timeline: what the scheduler's own clock says is no witness."""
    played = Played()
    free: dict[str, float] = defaultdict(float)
    ends: dict[str, float] = {}
    last_start = 0.0
    for op in program.ops:
        if op.is_wait:
            late = max(0.0, ends[op.waits_for] - played.step_s)
            played.exposed_s[op.lane] += late
            played.step_s += late
        elif op.is_issue:
            line = communicator(op)
            last_start = max(played.step_s, free[line], last_start)
            free[line] = ends[op.name] = last_start + default_price(program, op)
        else:
            played.compute_s += default_price(program, op)
            played.step_s += default_price(program, op)
    return played


def step_30b(**fields: object) -> Program:
    plan = replace(Plan(tp=4, cp=2, dp_shard=768), **fields)  # pyright: ignore[reportArgumentType]
    config = replace(preset("movie-gen-30b"), layers=8)  # the middle blocks are equal: eight tell
    return prepare(build_step(config, plan, BatchShape(1, USUAL_LATENTS["movie-gen-30b"])), backend="nccl")


def test_the_paper_plan_hides_what_it_can() -> None:
    """Exposed on TP4 CP2 by the default prices: 23 % as built, 9 % with units and weight gradients, 5 % with slices.

    Of all 48 blocks 20 %, 5 % and 2 %: the ends weigh less then.
    """
    overlapped = {"grad_units": 2, "defer_weight_gradients": True}
    plain = step_30b()
    deferred = step_30b(**overlapped)
    sliced = step_30b(**overlapped, kv_slices=4, tp_slices=4)
    exposed = [play(program).exposed for program in (plain, deferred, sliced)]
    assert exposed[0] > 0.15 and exposed[1] < 0.5 * exposed[0] and exposed[2] < 0.7 * exposed[1], exposed
    peaks = [lifetimes(program).peak_bytes for program in (plain, deferred, sliced)]
    unit_gradient = 604e6  # grad_units=2: one more, in fp32
    assert max(peaks) < peaks[0] + 3 * unit_gradient


def test_weight_gradients_wait_for_the_reduction_behind_attention() -> None:
    """Where cp leaves the server: some that are ready before attention's backward fill the gap behind it."""
    program = step_30b(tp=8, cp=4, dp_shard=192, kv_slices=3, grad_units=2, defer_weight_gradients=True)
    found = beside(program, "mb0/blocks.4.backward/dkv_slice.h2")
    assert {name for name in found if name.endswith("_weight")} - {"dq_weight"}


def test_products_and_bytes_are_those_of_the_plan_without_overlap() -> None:
    programs = (step_30b(), step_30b(kv_slices=4, tp_slices=4), step_30b(kv_chunks=4, kv_first=True))
    assert len({hardware_flops(program) for program in programs}) == 1  # joining what chunks gave multiplies nothing
    sent = [Counter[str]() for _ in programs]
    for program, counter in zip(programs, sent, strict=True):
        for op in (op for op in program.ops if op.is_issue):
            counter[f"{op.kind} {op.lane}"] += program.payload_bytes(op)
    assert sent[0] == sent[1] == sent[2]


# -- what cannot happen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp=2,kv_slices=4", "kv_slices(4) with cp(1): K and V are gathered over cp, so nothing would overlap; set"),
        ("tp=2,kv_chunks=4", "kv_chunks(4) with cp(1): K and V are gathered over cp, so nothing would overlap; set"),
        ("tp=2,kv_first=true", "kv_first(true) with cp(1)"),
        ("cp=2,kv_first=2", "kv_first is 2; it must be true or false"),
        ("cp=2,kv_slices=2,kv_chunks=3", "kv_slices(2) with kv_chunks(3): K and V travel by heads or by tokens; set"),
        ("cp=2,tp_slices=2", "tp_slices(2) with tp(1)"),
        ("tp=2,grad_units=2", "grad_units(2) with dp_shard(1), cp(1), dp_replicate(1)"),
        ("dp_shard=8,defer_weight_gradients=true", "defer_weight_gradients(true) with tp(1), cp(1)"),
        ("cp=2,kv_slices=0", "kv_slices is 0; it must be a whole number of at least 1"),
        ("tp=2,defer_weight_gradients=2", "defer_weight_gradients is 2; it must be true or false"),
        ("last_blocks=2", "recompute_last is None for last_blocks(2)"),
        ("recompute_last=full", "recompute_last is 'full' for last_blocks(0)"),
    ],
)
def test_an_overlap_that_cannot_happen_is_refused(text: str, said: str) -> None:
    with pytest.raises(CinemeshError, match=re.escape(said)):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp=4,cp=2,kv_slices=5", "heads of one rank(12) % kv_slices(5) = 2, it must be 0; choose a kv_slices that"),
        ("tp=4,cp=2,kv_chunks=5", "tokens of one cp rank(36864) % kv_chunks(5) = 4, it must be 0; choose a kv_chunks"),
        ("tp=4,cp=2,tp_slices=5", "tokens of one rank(9216) % tp_slices(5) = 1, it must be 0; choose a tp_slices that"),
    ],
)
def test_slices_that_do_not_divide_are_refused(text: str, said: str) -> None:
    with pytest.raises(CinemeshError, match=re.escape(said)):
        build_step(preset("movie-gen-30b"), Plan.parse(text), BatchShape(1, USUAL_LATENTS["movie-gen-30b"]))


def test_more_last_blocks_than_blocks_are_refused() -> None:
    plan = Plan.parse("recompute_last=full,last_blocks=3", dtype="float32")
    case = small_case(plan)  # shrinks the mixture with the model
    with pytest.raises(CinemeshError, match="last_blocks is 3; the model has 2 blocks"):
        prepare(build_step(case.config, plan, case.batch), backend="gloo")


def test_other_degrees_drop_the_overlap_that_they_cannot_have() -> None:
    chunked = Plan.parse("cp=2,kv_chunks=2,kv_first=true").with_degrees(cp=1)
    assert chunked == Plan()
    plan = Plan.parse(ALL)
    assert plan.with_degrees(cp=1).kv_slices == 1 and plan.with_degrees(cp=1).tp_slices == 3
    assert plan.with_degrees(dp_shard=1).grad_units == 2, "cp still splits the units"
    alone = plan.with_degrees(tp=1, cp=1, dp_shard=1)
    assert alone == Plan()
