"""A plan's overlap knobs by what they bring, what it keeps, how its GPU is shared (torch-free).

The search ranks plans of a few recompute modes whose unit gradients are reduced behind compute and that slice nothing.
Here the parts of K and V, token slices, deferral, prefetch depth and smaller shard groups are tried, each on top of
what the ones before brought, and kept when the step becomes shorter by more than ``WORTH``, until none pays any more;
then the activations worth keeping are chosen for the memory that is left. Last come thread blocks, SM margin and
priorities: they change prices and no record, so all are tried on one built program, and played only where a lower bound
leaves something to win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..errors import CinemeshError
from ..model.step import Batch, check
from ..parallel.keep import choose
from ..parallel.ops import OPS
from ..parallel.plan import STREAMS, Plan
from ..parallel.program import Op, Program
from .cluster import Cluster
from .family import Choice, Prices, Request, mixed_peak_bytes, parts
from .floor import Recompute
from .network import Network, group_of, groups_of
from .planner import Search
from .shallow import Shallow
from .skeleton import STEADY_BLOCKS, NotSteady, Priced, Skeleton

WORTH = 1e-3  # relative gain below which a knob stays as it was: slices cost kernels and launches that no model sees
SLICES = ((2, 3, 4, 6, 12), (2, 3, 4, 6, 8), (2, 4, 8))  # of heads of K and V; of their tokens; of tokens over tp
SMALLER = (2, 4, 8, 16)  # parts of the shard group
SHARING: dict[str, tuple[object, ...]] = {  # NCCL's own: up to 24 thread blocks, with priority, and no margin
    "tp_ctas": (4, 8, 16),
    "cp_ctas": (4, 8, 16),
    "unit_ctas": (2, 4, 8),
    "sm_margin": (4, 8, 16),
    "normal_priority": tuple((name,) for name in STREAMS),
}


Change = dict[str, Any]


def _ladders(plan: Plan) -> Iterator[list[Change]]:
    """Changes of one kind, each with more of it than the one before."""
    heads, tokens, over_tp = SLICES
    yield [{"kv_slices": n, "kv_chunks": 1} for n in heads]
    yield [{"kv_slices": 1, "kv_chunks": n} for n in tokens]
    yield [{"tp_slices": n} for n in over_tp]
    yield [{"defer_weight_gradients": True}]
    yield [{"prefetch": 2}]
    yield [{"kv_first": True}]
    groups = [n for n in SMALLER if plan.dp_shard % n == 0]
    yield [{"dp_shard": plan.dp_shard // n, "dp_replicate": plan.dp_replicate * n} for n in groups]


def _changed(prices: Prices, plan: Plan, change: Change) -> Plan | None:
    """None for what was fixed by hand, and for what these degrees or this GPU cannot have."""
    fixed = prices.request.fixed
    if any(fixed.get(name, value) != value for name, value in change.items()):
        return None
    try:
        changed = replace(plan, **change)
        prices.compute.check(changed)
    except CinemeshError:
        return None
    return changed


def tune(request: Request, choice: Choice, prices: Prices | None = None) -> Choice:
    """The same degrees of tp and cp and the same placement, with what pays."""
    prices = prices or Prices(request)
    first = _price(prices, request, choice, choice.plan)
    if first is None:
        return choice
    best, built = _overlapping(prices, request, *first)
    if "recompute" not in request.fixed and (kept := _keeping(prices, request, best)) is not None:
        best, built = kept
    if request.cluster.nccl is not None:
        best = _sharing(prices, request, best, built)
    return best if _fits(request, best) and best.step_s < first[0].step_s else first[0]


def _fits(request: Request, choice: Choice) -> bool:
    return choice.peak_bytes <= request.cluster.memory.usable_bytes


def _overlapping(prices: Prices, request: Request, choice: Choice, built: Built) -> tuple[Choice, Built]:
    """The choice with what pays of every ladder, climbed until a step on it is worse than the one before."""
    best, before = choice, None
    while best is not before:
        before = best
        for ladder in _ladders(best.plan):
            last_s = math.inf
            for change in ladder:
                plan = _changed(prices, best.plan, change)
                tried = None if plan in (None, best.plan) else _price(prices, request, best, plan)
                if tried is None:
                    continue
                if not _fits(request, tried[0]) or tried[0].step_s > last_s:
                    break
                last_s = tried[0].step_s
                if last_s < best.step_s * (1.0 - WORTH):
                    best, built = tried
    return best, built


def _keeping(prices: Prices, request: Request, choice: Choice) -> tuple[Choice, Built] | None:
    """The choice with the activations kept that save most time in the memory that is left (``parallel/keep.py``)."""
    layers, batch = request.config.layers, Batch(choice.samples, request.buckets[0].latent)
    pure = parts(choice.plan, layers)[0][1]
    shallow = Shallow(request.config, pure, batch)
    made: dict[Recompute, Skeleton] = {}

    def skeleton(plan: Plan) -> Skeleton:
        if plan.recompute not in made:
            made[plan.recompute] = Skeleton(shallow, plan, prices.compute, request.cluster)
        return made[plan.recompute]

    def peak_bytes(plan: Plan) -> int:
        shares = parts(plan, layers)
        if len(shares) == 1:
            return skeleton(plan).peak_bytes(plan)
        (_, first), (_, last) = shares
        return mixed_peak_bytes(skeleton(first), skeleton(last), first, plan.last_blocks, layers)

    def seconds(program: Program, op: Op) -> float:
        if op.kind in OPS:
            return prices.compute.op_s(program, op)
        if op.kind == "wait":
            return 0.0
        group = group_of(request.cluster, pure, op.axes)
        return prices.network.collective(op.kind, program.payload_bytes(op), group, pure.ctas(op.axes)).seconds

    limit = prices.limit_bytes(choice.plan) - (choice.frozen.bytes if choice.frozen else 0)
    try:
        plan, _ = choose(pure, shallow.program, seconds, int(limit), peak_bytes, blocks=layers)
    except CinemeshError:
        return None
    return _price(prices, request, choice, plan)


def _sharing(prices: Prices, request: Request, choice: Choice, built: Built) -> Choice:
    """The choice with the thread blocks, priorities and margin that pay, tried until none pays any more."""
    best, before = choice, None
    while best is not before:
        before = best
        for knob, values in SHARING.items():
            for value in values:
                plan = _changed(prices, best.plan, {knob: value})
                tried = None if plan is None else _shared(prices, request, best, plan, built)
                if tried is not None and tried.step_s < best.step_s * (1.0 - WORTH):
                    best = tried
    return best


def _shared(prices: Prices, request: Request, best: Choice, plan: Plan, built: Built) -> Choice | None:
    """``best`` under a plan of the same records; None where it cannot be better, or only the whole step could say."""
    shares = parts(plan, request.config.layers)
    other = [[s.under(part) for s, (_, part) in zip(row, shares, strict=True)] for row in built]
    groups = groups_of(plan, request.cluster)
    least = prices.mean(
        sum(share * s.bound_s(part, prices.network, groups) for s, (share, part) in zip(row, shares, strict=True))
        for row in other
    )
    held = best.frozen.seconds if best.frozen else 0.0
    if (least + held) * request.cluster.spread.factor(plan.world_size) >= best.step_s * (1.0 - WORTH):
        return None
    try:
        return _priced(prices, request, best, plan, other, Skeleton.steady_price)
    except NotSteady:
        return None


Built = list[list[Skeleton]]  # for each bucket, one of each recompute mode
Pricing = Callable[[Skeleton, Plan, Network, Cluster], Priced]


def _build(prices: Prices, request: Request, choice: Choice, plan: Plan) -> Built | None:
    """The skeletons of a plan; None where the shape does not allow it."""
    shares = parts(plan, request.config.layers)
    pure = shares[0][1]
    built: Built = []
    for bucket in request.buckets:
        batch = Batch(choice.samples, bucket.latent)
        try:
            check(request.config, plan, batch)
        except CinemeshError:
            return None
        shallow = Shallow(request.config, pure, batch, blocks=STEADY_BLOCKS + pure.prefetch - 1)
        built.append([Skeleton(shallow, part, prices.compute, request.cluster) for _, part in shares])
    return built


def _price(prices: Prices, request: Request, choice: Choice, plan: Plan) -> tuple[Choice, Built] | None:
    """The choice under another plan, whether it fits or not, and its skeletons; None where the shape forbids it."""
    built = _build(prices, request, choice, plan)
    return None if built is None else (_priced(prices, request, choice, plan, built, Skeleton.price), built)


def _priced(prices: Prices, request: Request, choice: Choice, plan: Plan, built: Built, pricing: Pricing) -> Choice:
    layers = request.config.layers
    shares = parts(plan, layers)
    pure = shares[0][1]
    steps: list[float] = []
    computes: list[float] = []
    peaks: list[int] = []
    for skeletons in built:
        priced = [
            pricing(s, part, prices.network, request.cluster) for s, (_, part) in zip(skeletons, shares, strict=True)
        ]
        steps.append(sum(share * p.step_s for (share, _), p in zip(shares, priced, strict=True)))
        computes.append(sum(share * p.compute_s for (share, _), p in zip(shares, priced, strict=True)))
        peaks.append(
            skeletons[0].peak_bytes(pure)
            if len(shares) == 1
            else mixed_peak_bytes(skeletons[0], skeletons[1], pure, plan.last_blocks, layers)
        )
    held = (choice.frozen.seconds, choice.frozen.bytes) if choice.frozen else (0.0, 0)
    peak = max(peaks) + held[1] + prices.outside_bytes(plan)
    spread = request.cluster.spread.factor(plan.world_size)
    return replace(
        choice,
        plan=plan,
        step_s=(prices.mean(iter(steps)) + held[0]) * spread,
        compute_s=prices.mean(iter(computes)),
        peak_bytes=peak,
    )


def tuned(request: Request, found: Search) -> Search:
    """All plans of a table, tuned and ranked anew."""
    prices = Prices(request)
    choices = [tune(request, choice, prices) for choice in found.choices]
    choices.sort(key=lambda c: (c.step_s / c.global_batch, repr(c.plan)))
    return replace(found, choices=choices)
