"""A plan's overlap knobs, one after the other by what they bring, and what it keeps (torch-free).

The search ranks plans of a few recompute modes whose unit gradients are reduced behind compute and that slice nothing.
Here slices, deferred weight gradients and prefetch depth are tried, each on top of what the ones before brought, and
kept when the step becomes shorter by more than ``WORTH``; then the activations worth keeping are chosen for the memory
that is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import CinemeshError
from ..model.step import Batch, check
from ..parallel.keep import choose
from ..parallel.ops import OPS
from ..parallel.plan import Plan
from ..parallel.program import Op, Program
from .family import Choice, Prices, Request, mixed_peak_bytes, parts
from .floor import Recompute
from .network import group_of
from .planner import Search
from .shallow import Shallow
from .skeleton import STEADY_BLOCKS, Skeleton

WORTH = 1e-3  # relative gain below which a knob stays as it was: slices cost kernels and launches that no model sees
KNOBS: dict[str, tuple[object, ...]] = {
    "kv_slices": (2, 3, 4, 6, 12),
    "tp_slices": (2, 4, 8),
    "defer_weight_gradients": (True,),
    "prefetch": (2,),
}


def _trials(plan: Plan, knob: str, fixed: dict[str, object]) -> Iterator[Plan]:
    if knob in fixed:
        return
    for value in KNOBS[knob]:
        changed: dict[str, Any] = {knob: value}
        try:
            yield replace(plan, **changed)
        except CinemeshError:  # an overlap that these degrees cannot have
            continue


def tune(request: Request, choice: Choice, prices: Prices | None = None) -> Choice:
    """The same degrees, recompute and placement with the overlap knobs that pay."""
    prices = prices or Prices(request)
    best = choice
    for knob in KNOBS:
        for plan in _trials(best.plan, knob, request.fixed):
            tried = _price(prices, request, best, plan)
            if tried is not None and tried.step_s < best.step_s * (1.0 - WORTH):
                best = tried
    if "recompute" not in request.fixed:
        best = _keeping(prices, request, best)
    fits = best.peak_bytes <= request.cluster.memory.usable_bytes
    return best if fits and best.step_s < choice.step_s else choice


def _keeping(prices: Prices, request: Request, choice: Choice) -> Choice:
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
        return prices.network.collective(op.kind, program.payload_bytes(op), group).seconds

    limit = prices.limit_bytes(choice.plan) - (choice.frozen.bytes if choice.frozen else 0)
    try:
        plan, _ = choose(pure, shallow.program, seconds, int(limit), peak_bytes, blocks=layers)
    except CinemeshError:
        return choice
    return _price(prices, request, choice, plan) or choice


def _price(prices: Prices, request: Request, choice: Choice, plan: Plan) -> Choice | None:
    """The choice under another plan, whether it fits or not; None where the shape does not allow it."""
    layers = request.config.layers
    shares = parts(plan, layers)
    steps: list[float] = []
    computes: list[float] = []
    peaks: list[int] = []
    for bucket in request.buckets:
        batch = Batch(choice.samples, bucket.latent)
        try:
            check(request.config, plan, batch)
        except CinemeshError:
            return None
        pure = shares[0][1]
        shallow = Shallow(request.config, pure, batch, blocks=STEADY_BLOCKS + pure.prefetch - 1)
        skeletons = [Skeleton(shallow, part, prices.compute, request.cluster) for _, part in shares]
        priced = [
            s.price(part, prices.network, request.cluster) for s, (_, part) in zip(skeletons, shares, strict=True)
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
