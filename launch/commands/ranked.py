"""A plan of a search as ``--json`` tells it (torch-free)."""

from __future__ import annotations

from ...perf_model.report import explain
from ...perf_model.search.request import PricedPlan, Request
from .reply import RankedPlan


def ranked(request: Request, choice: PricedPlan, flops: float) -> RankedPlan:
    """A plan of a table; ``flops``: the model's, of a sample."""
    bar = explain.error_bar_of(request)
    return RankedPlan(
        plan=choice.plan.to_dict(),
        gpus=choice.plan.world_size,
        samples=choice.samples,
        global_batch=choice.global_batch,
        step_s=choice.step_s,
        step_s_low=choice.step_s * (1.0 + bar.low),
        step_s_high=choice.step_s * (1.0 + bar.high),
        samples_per_s=choice.samples_per_s,
        mfu=explain.mfu_of(request, choice, flops),
        hfu=explain.hfu_of(request, choice),
        compute_s=choice.compute_s,
        exposed_s=choice.exposed_s,
        exposed_fraction=choice.exposed_fraction,
        peak_bytes=choice.peak_bytes,
        limit_bytes=request.cluster.memory.usable_bytes,
        step_s_from=choice.timed.name.lower(),
        bound_s=choice.bound_s,
        sharded_encoders=list(choice.frozen.sharded) if choice.frozen else [],
    )
