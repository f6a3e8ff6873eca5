"""What to keep: the model of a block is what rematerialize does, and no choice beats the one that is made."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from functools import lru_cache

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Phase, Space
from cinemesh.parallel.passes.choose_kept import (
    Activation,
    BlockCosts,
    Maker,
    block_of,
    choose_kept,
    offloads,
    share_budget,
)
from cinemesh.parallel.passes.elide import elide
from cinemesh.parallel.passes.liveness import lifetimes
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.passes.prices import RATES
from cinemesh.parallel.passes.recompute import rematerialize

BLOCK = 2
default_price = RATES["nccl"].price
CHOICES = ("none", "selective", "full", ("o", "lse"), ("kv_gathered", "gate", "x1"), ("h1_gathered", "q", "y3_partial"))


def built(text: str, layers: int = 4) -> Program:
    plan = Plan.parse(text, dtype="float32")
    case = small_case(plan, max_procs=16)
    return build_step(replace(case.config, layers=layers), plan, case.batch)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(
    "text", ["tp=1", "tp=2,cp=2", "cp=2,kv_slices=3", "cp=2,kv_chunks=3", "tp=2,cp=2,kv_slices=3,tp_slices=3"]
)
def test_the_model_is_what_rematerialize_does(text: str, choice: str | tuple[str, ...]) -> None:
    """Seconds of what is made again for one block, and bytes of it that live between forward and backward."""
    program = built(text)
    point = block_of(program, default_price).point(choice)
    program.plan = replace(program.plan, recompute=choice)
    done = elide(rematerialize(program))
    forward = [op for op in done.ops if op.place.block == BLOCK and op.place.phase is Phase.FORWARD]
    again = [op for op in forward if op.clone]
    assert point.seconds == pytest.approx(sum(default_price(done, op) for op in again))
    lives = lifetimes(done)
    turn = next(i for i, op in enumerate(done.ops) if op.kind == "velocity_loss_backward")
    alive = {root for roots in lives.allocate[:turn] for root in roots} - {r for rs in lives.free[:turn] for r in rs}
    made = {name for op in forward if not op.clone for name in op.outputs}
    outputs = {done.root(name)[0] for name in made if done.buffers[name].role == "x"}
    kept = {done.root(name)[0] for name in made} & alive - outputs
    assert point.kept_bytes == sum(done.bytes(root) for root in kept)


# -- the optimum ------------------------------------------------------------------------------------------------------


def random_block(seed: int, activations: int) -> BlockCosts:
    """Makers read what earlier ones made; some make two activations."""
    draw = random.Random(seed)
    makers: list[Maker] = []
    found: list[Activation] = []
    while len(found) < activations:
        reads = tuple(sorted(draw.sample(range(len(found)), min(len(found), draw.randint(0, 2)))))
        makers.append(Maker(draw.randint(1, 20), reads))
        for _ in range(draw.choice((1, 1, 2))):
            found.append(Activation((f"a{len(found)}",), draw.randint(1, 9), len(makers) - 1, draw.random() < 0.5))
    return BlockCosts(tuple(found), tuple(makers))


def every_choice(block: BlockCosts) -> list[tuple[int, float]]:
    """(bytes, seconds) of all subsets."""
    roles = [role for a in block.activations for role in a.roles]
    subsets = itertools.chain.from_iterable(itertools.combinations(roles, n) for n in range(len(roles) + 1))
    return [(p.kept_bytes, p.seconds) for p in map(block.point, subsets)]


@pytest.mark.parametrize("seed", range(12))
def test_a_weighed_choice_is_the_best_of_all(seed: int) -> None:
    block = random_block(seed, 9)
    choices = every_choice(block)
    for weight in (0.01, 0.3, 1.0, 2.5, 7.0, 100.0):
        found = block.best(weight)
        assert found.seconds + weight * found.kept_bytes == pytest.approx(min(s + weight * b for b, s in choices))


@pytest.mark.parametrize("seed", range(6))
def test_sharing_a_budget_is_within_its_bound_of_the_best_of_all(seed: int) -> None:
    """Three blocks, each with any subset: the exact optimum by exhaustive search."""
    block, blocks = random_block(seed, 6), 3
    choices = set(every_choice(block))
    least: dict[int, float] = {}  # bytes -> seconds, over all ways to choose_kept for the three
    for combination in itertools.combinations_with_replacement(sorted(choices), blocks):
        size = sum(b for b, _ in combination)
        least[size] = min(least.get(size, float("inf")), sum(s for _, s in combination))
    fastest = block.point("none")
    for budget in range(0, blocks * fastest.kept_bytes + 3, 2):
        choice = share_budget(block, blocks, budget)
        assert choice is not None and choice.kept_bytes <= budget
        optimum = min(seconds for size, seconds in least.items() if size <= budget)
        assert choice.bound_seconds <= optimum + 1e-9 <= choice.seconds + 2e-9
        assert choice.seconds - choice.bound_seconds <= choice.first.seconds - choice.last.seconds + 1e-9 or (
            choice.last_blocks == 0
        )


# -- the 30B block ----------------------------------------------------------------------------------------------------

NAME = "movie-gen-30b"


@lru_cache
def step_30b(layers: int = 48) -> Program:
    plan = Plan(tp=4, cp=2, dp_shard=768)
    return build_step(replace(preset(NAME), layers=layers), plan, BatchShape(1, USUAL_LATENTS[NAME]))


@lru_cache
def block_30b() -> BlockCosts:
    return block_of(step_30b(), default_price)


@pytest.mark.parametrize("budget", [2e9, 12e9, 40e9, 79e9, 160e9])
def test_the_30b_blocks_at_five_memory_bounds(budget: float) -> None:
    block = block_30b()
    choice = share_budget(block, 48, int(budget))
    assert choice is not None and choice.kept_bytes <= budget
    fitting = [p for p in map(block.point, ("none", "selective", "full")) if 48 * p.kept_bytes <= budget]
    assert choice.seconds <= 48 * min(p.seconds for p in fitting)
    assert choice.seconds - choice.bound_seconds <= max(choice.first.seconds - choice.last.seconds, 0) + 1e-9
    applied = choice.applied(step_30b().plan)
    assert applied.last_blocks == choice.last_blocks and Plan.from_yaml(applied.to_yaml()) == applied


def test_attention_is_kept_first() -> None:
    """Its output is the cheapest byte to keep: 109 MB a block spare over half of what full makes again."""
    hull = block_30b().hull
    assert set(hull[1].keep) == {"o", "lse"} and hull[1].seconds < 0.5 * hull[0].seconds
    slopes = [
        (low.seconds - high.seconds) / (high.kept_bytes - low.kept_bytes) for low, high in itertools.pairwise(hull)
    ]
    assert slopes == sorted(slopes, reverse=True), "a convex hull"
    selective = block_30b().point("selective")
    better = [p for p in hull if p.kept_bytes <= selective.kept_bytes]
    assert min(p.seconds for p in better) < 1.05 * selective.seconds


def test_no_subset_of_the_30b_block_beats_the_hull() -> None:
    """Exhaustive over the twelve activations with most seconds behind them, all others as the hull has them."""
    block = block_30b()
    hull = block.hull
    base = hull[len(hull) // 2].keep
    free = ("o", "kv", "kv_gathered", "q", "gate", "up", "y3", "y1", "x2", "cross_q", "cross_o", "h2_gathered")
    fixed = tuple(role for role in base if role not in free)
    for kept in itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(len(free) + 1)):
        point = block.point((*fixed, *kept))
        for low, high in itertools.pairwise(hull):
            if low.kept_bytes <= point.kept_bytes <= high.kept_bytes:
                part = (point.kept_bytes - low.kept_bytes) / (high.kept_bytes - low.kept_bytes)
                assert point.seconds >= low.seconds + part * (high.seconds - low.seconds) - 1e-9


def peak_bytes(plan: Plan) -> int:
    program = build_step(replace(preset(NAME), layers=6), plan, BatchShape(1, USUAL_LATENTS[NAME]))
    return lifetimes(prepare(program, backend="nccl")).peak_bytes


@pytest.mark.parametrize("share_of_range", [0, 0.1, 0.5, 0.95])
def test_a_plan_is_chosen_that_fits_its_peak(share_of_range: float) -> None:
    program = step_30b(layers=6)
    least, most = (peak_bytes(replace(program.plan, recompute=name)) for name in ("full", "none"))
    limit = int(least + share_of_range * (most - least))
    plan, choice = choose_kept(program.plan, program, default_price, limit, peak_bytes)
    assert peak_bytes(plan) <= limit
    block = block_of(program, default_price)
    for name in ("none", "selective", "full"):
        if peak_bytes(replace(program.plan, recompute=name)) <= limit:
            assert choice.seconds <= 6 * block.point(name).seconds + 1e-12


def test_what_even_full_does_not_fit_is_refused() -> None:
    program = step_30b(layers=6)
    with pytest.raises(CinemeshError, match=re.escape("recompute full peaks at ")):
        choose_kept(program.plan, program, default_price, 10**9, peak_bytes)


def test_what_goes_to_the_host_fits_both_memories_and_saves_time() -> None:
    """Of every plan that is offered, by the whole program: only this sees one that would not fit when it runs."""
    program, layers = built("tp=2,cp=2", layers=6), 6
    block = block_of(program, default_price)

    @lru_cache
    def lives(plan: Plan) -> tuple[int, int]:
        prepared = prepare(replace(program, plan=plan), backend="nccl")
        return tuple(lifetimes(prepared, space).peak_bytes for space in Space)  # type: ignore[return-value]

    def peak(plan: Plan) -> int:
        return lives(plan)[0]

    least, most = (peak(replace(program.plan, recompute=name)) for name in ("full", "none"))
    limit = (least + most) // 2
    _, kept = choose_kept(program.plan, program, default_price, limit, peak)
    offered = list(offloads(program.plan, block, layers, limit, 1e12, peak, kept.seconds))
    assert len(offered) > 1
    again = [layers * block.point(plan.recompute).seconds for plan in offered]
    assert again == sorted(again) and again[-1] < kept.seconds
    for plan in offered:
        assert peak(plan) <= limit < peak(replace(plan, offload=()))
        if plan.last_blocks < layers - 1:
            assert peak(replace(plan, last_blocks=plan.last_blocks + 1)) > limit, "more blocks may keep their own"
    most_away = max(lives(plan)[1] for plan in offered)
    fewer = list(offloads(program.plan, block, layers, limit, most_away - 1, peak, kept.seconds))
    assert fewer == [plan for plan in offered if lives(plan)[1] < most_away] != offered
