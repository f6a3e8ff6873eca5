"""A plan of a search as ``--json`` tells it (torch-free)."""

from __future__ import annotations

from ...model.config import latent_text
from ...perf_model.report import explain
from ...perf_model.search.request import PricedPlan, Request
from .reply import LatentStep, RankedPlan


def ranked(request: Request, choice: PricedPlan, flops: float) -> RankedPlan:
    """A plan of a table; ``flops``: the model's, of a sample."""
    bar = explain.error_bar_of(request)
    latents = _latents(request, choice)
    return RankedPlan(
        plan=choice.plan.to_dict(),
        gpus=choice.plan.world_size,
        samples=latents[0].samples,
        global_batch=latents[0].global_batch,
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
        encoders_s=choice.frozen.seconds if choice.frozen else 0.0,
        latents=latents,
    )


def _latents(request: Request, choice: PricedPlan) -> list[LatentStep]:
    weights = sum(bucket.weight for bucket in request.buckets)
    peak_flops = request.gpus * request.cluster.gpu.peak_flops[choice.plan.compute_dtype]
    steps: list[LatentStep] = []
    for bucket, step_s in zip(request.buckets, choice.bucket_s, strict=True):
        samples_per_s = bucket.times * choice.global_batch / step_s
        step = LatentStep(
            latent=latent_text(bucket.latent),
            tokens=request.config.tokens(bucket.latent),
            share=bucket.weight / weights,
            samples=bucket.times * choice.samples,
            global_batch=bucket.times * choice.global_batch,
            step_s=step_s,
            samples_per_s=samples_per_s,
            mfu=explain.sample_flops(request.config, bucket.latent) * samples_per_s / peak_flops,
        )
        steps.append(step)
    return steps
