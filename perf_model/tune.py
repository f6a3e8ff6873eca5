"""Overlap knobs of a plan, set one after the other by what they bring (torch-free).

The search ranks plans whose unit gradients are reduced behind compute and that slice nothing. Here a plan's slices,
deferred weight gradients, prefetch depth and unit gradients are tried, each on top of what the ones before brought, and
kept when the step becomes shorter by more than ``WORTH`` and still fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import CinemeshError
from ..model.step import Batch, check
from ..parallel.plan import Plan
from .planner import Choice, Planner, Request, Search
from .skeleton import STEADY_BLOCKS, Shallow, Skeleton

WORTH = 1e-3  # relative gain below which a knob stays as it was: slices cost kernels and launches that no model sees
KNOBS: dict[str, tuple[object, ...]] = {
    "kv_slices": (2, 4),
    "tp_slices": (2, 4),
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


def tune(request: Request, choice: Choice, planner: Planner | None = None) -> Choice:
    """The same degrees, recompute and placement with the overlap knobs that pay."""
    planner = planner or Planner(request)
    best = choice
    for knob in KNOBS:
        for plan in _trials(best.plan, knob, request.fixed):
            tried = _price(planner, request, best, plan)
            if tried is not None and tried.step_s < best.step_s * (1.0 - WORTH):
                best = tried
    return best


def _price(planner: Planner, request: Request, choice: Choice, plan: Plan) -> Choice | None:
    """The choice under another plan; None where the shape does not allow it or it does not fit."""
    skeletons: list[Skeleton] = []
    for bucket in request.buckets:
        batch = Batch(choice.samples, bucket.latent)
        try:
            check(request.config, plan, batch)
        except CinemeshError:
            return None
        skeletons.append(
            Skeleton(
                Shallow(request.config, plan, batch, blocks=STEADY_BLOCKS + 1), plan, planner.compute, request.cluster
            )
        )
    held = (choice.frozen.seconds, choice.frozen.bytes) if choice.frozen else (0.0, 0)
    peak = max(skeleton.peak_bytes(plan) for skeleton in skeletons) + held[1] + planner.outside_bytes(plan)
    if peak > request.cluster.memory.usable_bytes:
        return None
    priced = [skeleton.price(plan, planner.network, request.cluster) for skeleton in skeletons]
    spread = request.cluster.spread.factor(plan.world_size)
    return replace(
        choice,
        plan=plan,
        step_s=(planner.mean(p.step_s for p in priced) + held[0]) * spread,
        compute_s=planner.mean(p.compute_s for p in priced),
        peak_bytes=peak,
    )


def tuned(request: Request, found: Search) -> Search:
    """All plans of a table, tuned and ranked anew."""
    planner = Planner(request)
    choices = [tune(request, choice, planner) for choice in found.choices]
    choices.sort(key=lambda c: (c.step_s / c.global_batch, repr(c.plan)))
    return replace(found, choices=choices)
