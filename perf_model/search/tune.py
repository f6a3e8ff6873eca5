"""A plan's overlap knobs by what they bring, what it keeps, how its GPU is shared (torch-free).

The search ranks plans of a few recompute modes whose unit gradients are reduced behind compute and that slice nothing.
Here the parts of K and V, token slices, deferral, prefetch depth and smaller shard groups are tried, each on top of
what the ones before brought, and kept when the step becomes shorter by more than ``WORTH``, until none pays any more;
then the activations worth keeping are chosen for the memory that is left. Last come thread blocks, SM margin and
priorities: they change prices and no record, so all are tried on one built program, and played only where a lower bound
leaves something to win.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from ...errors import CinemeshError
from ...kernels.ops import OPS
from ...model.inputs import BatchShape
from ...model.step import check
from ...parallel.ir.fields import Overlap, Streams
from ...parallel.ir.knobs import knobs
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op
from ...parallel.passes.choose_kept import choose_kept
from ..clusters.cluster import Cluster
from ..prices.network import Network, group_of, groups_of
from .extrapolate import STEADY_BLOCKS, NotSteady, Priced, Skeleton
from .few_blocks import Shallow
from .lower_bound import Recompute
from .planner import Search
from .space import Choice, Prices, Request, mixed_peak_bytes, parts

WORTH = 1e-3  # relative gain below which a knob stays as it was: slices cost kernels and launches that no model sees
ROUGHLY = 0.02  # relative difference of two blocks' times up to which a shallow step tells what pays
SMALLER = (2, 4, 8, 16, 32, 48)  # parts of the shard group
# NCCL's own: up to 24 thread blocks, with priority, and no margin.
SHARING = {name: knob.tries for name, knob in knobs(Streams).items()}


Change = dict[str, Any]


def _changes() -> Iterator[list[Change]]:
    """What may be changed of the overlap, one knob after the other: its values, those of the knobs tried with it."""
    table = knobs(Overlap)
    beside = {name for knob in table.values() for name in knob.tried_with}
    for name, knob in table.items():
        if name not in beside:
            tried = {other: table[other].tries for other in (*knob.tried_with, name)}
            off = {other: table[other].off for other in knob.rivals}
            yield [off | dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]


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
    same = _overlapping(prices, request, *first, groups=(1,))
    finished = [first[0], _finished(prices, request, *same)]
    if _smaller_fits(prices, request, *same):
        before, last = same, _overlapping(prices, request, *same, groups=(1, *SMALLER))
        while last[0] is not before[0]:
            before, last = last, _overlapping(prices, request, *last, groups=(1, *SMALLER))
        finished.append(_finished(prices, request, *last))
    return min((c for c in finished if c is first[0] or _fits(request, c)), key=lambda c: c.step_s)


def _roughly(skeleton: Skeleton, plan: Plan, network: Network, cluster: Cluster) -> Priced:
    """Where the shallow step is steady enough to tell what pays: the whole one takes a hundred times as long."""
    return skeleton.steady_price(plan, network, cluster, steady=ROUGHLY)


def _finished(prices: Prices, request: Request, best: Choice, built: Built) -> Choice:
    """With what is worth keeping kept, and its GPU shared as it pays; priced as exactly as any plan."""
    best = _priced(prices, request, best, best.plan, built, Skeleton.price)
    if "recompute" not in request.fixed and (kept := _keeping(prices, request, best)) is not None:
        best, built = kept
    return best if request.cluster.nccl is None else _sharing(prices, request, best, built)


def _fits(request: Request, choice: Choice) -> bool:
    return choice.peak_bytes <= request.cluster.memory.usable_bytes


def _in_parts(prices: Prices, plan: Plan, n: int) -> Plan | None:
    """The plan with its shard group in ``n`` parts; replicas of each other."""
    if plan.dp_shard % n:
        return None
    return _changed(prices, plan, {"dp_shard": plan.dp_shard // n, "dp_replicate": plan.dp_replicate * n})


def _smaller_fits(prices: Prices, request: Request, choice: Choice, built: Built) -> bool:
    """Whether there is memory for half the shard group: else none of that need be tried."""
    half = _in_parts(prices, choice.plan, SMALLER[0])
    return half is not None and _fits(request, _priced(prices, request, choice, half, built, Skeleton.price))


def _overlapping(
    prices: Prices, request: Request, choice: Choice, built: Built, groups: tuple[int, ...]
) -> tuple[Choice, Built]:
    """The choice with the best change of each kind that pays, in the shard group that suits it."""
    best = choice
    for changes in _changes():
        start = best.plan
        for change in changes:
            plan = _changed(prices, start, change)
            tried = None if plan in (None, start) else _in_groups(prices, request, best, plan, groups)
            if tried is not None:
                best, built = tried
    return best, built


def _in_groups(
    prices: Prices, request: Request, best: Choice, plan: Plan, groups: tuple[int, ...]
) -> tuple[Choice, Built] | None:
    """The plan in the shard group that suits it, if that pays: one built program serves them all."""
    built = _build(prices, request, best, plan)
    if built is None:
        return None
    found = None
    for n in groups:
        smaller = _in_parts(prices, plan, n)
        if smaller is None or _least_s(prices, request, best, smaller, built) >= best.step_s * (1.0 - WORTH):
            continue
        try:
            tried = _priced(prices, request, best, smaller, built, _roughly)
        except NotSteady:
            if n > 1:
                continue
            tried = _priced(prices, request, best, smaller, built, Skeleton.price)
        fits = n == 1 or _fits(request, tried)  # what is kept may make room for a knob, not for a larger shard
        if fits and tried.step_s < best.step_s * (1.0 - WORTH):
            best, found = tried, (tried, built)
    return found


def _keeping(prices: Prices, request: Request, choice: Choice) -> tuple[Choice, Built] | None:
    """The choice with the activations kept that save most time in the memory that is left (``choose_kept.py``)."""
    layers, batch = request.config.layers, BatchShape(choice.samples, request.buckets[0].latent)
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
        if op.is_wait:
            return 0.0
        group = group_of(request.cluster, pure, op.axes)
        return prices.network.collective(op.kind, program.payload_bytes(op), group, pure.ctas(op.axes)).seconds

    limit = prices.limit_bytes(choice.plan) - (choice.frozen.bytes if choice.frozen else 0)
    try:
        plan, _ = choose_kept(pure, shallow.program, seconds, int(limit), peak_bytes, blocks=layers)
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
    if _least_s(prices, request, best, plan, other) >= best.step_s * (1.0 - WORTH):
        return None
    try:
        return _priced(prices, request, best, plan, other, Skeleton.steady_price)
    except NotSteady:
        return None


def _least_s(prices: Prices, request: Request, best: Choice, plan: Plan, built: Built) -> float:
    """A lower bound of the step under ``plan``, which ``built`` was built for."""
    shares = parts(plan, request.config.layers)
    groups = groups_of(plan, request.cluster)
    least = prices.mean(
        sum(share * s.bound_s(part, prices.network, groups) for s, (share, part) in zip(row, shares, strict=True))
        for row in built
    )
    held = best.frozen.seconds if best.frozen else 0.0
    return (least + held) * request.cluster.spread.factor(plan.world_size)


Built = list[list[Skeleton]]  # for each bucket, one of each recompute mode
Pricing = Callable[[Skeleton, Plan, Network, Cluster], Priced]


def _build(prices: Prices, request: Request, choice: Choice, plan: Plan) -> Built | None:
    """The skeletons of a plan; None where the shape does not allow it."""
    shares = parts(plan, request.config.layers)
    pure = shares[0][1]
    built: Built = []
    for bucket in request.buckets:
        batch = BatchShape(choice.samples, bucket.latent)
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


Watch = Callable[[list[Choice]], Iterable[Choice]]


def tuned(request: Request, found: Search, watch: Watch = iter) -> Search:
    """All plans of a table, tuned and ranked anew. ``watch`` sees them one by one: some seconds each."""
    prices = Prices(request)
    choices = [tune(request, choice, prices) for choice in watch(found.choices)]
    choices.sort(key=lambda c: (c.step_s / c.global_batch, repr(c.plan)))
    return replace(found, choices=choices)
