"""``cinemesh explain``: why a plan takes as long as it does, by its whole step, as text or JSON (torch-free)."""

from __future__ import annotations

from dataclasses import replace

from ...parallel.ir.plan import Plan
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.played import PlayedStep
from ...perf_model.report import explain
from ...perf_model.report.explain import describe, digits
from ...perf_model.report.software import OtherSoftware, PricedKernel, kernels_of, other_software
from ...perf_model.search.evaluator import Evaluator
from ...perf_model.search.planner import survey
from ...perf_model.search.request import Request
from ..options import Asked
from ..progress import Begin, progress
from ..tables import new_console
from . import reply
from .asked import Workload, plans_asked, print_taken
from .reasons import Reasons, start_up_cost
from .reply import ExplainReply, PlayedPlan, Schema
from .software import print_kernels, print_order, print_others

PIECES = 6  # of the work of ``cinemesh explain``, for its progress


def asked_of(plan: Plan, load: Workload) -> Request:
    """What the planner would be asked, for as many GPUs and micro-batches as a plan has."""
    return Request(
        config=load.config,
        buckets=load.buckets,
        cluster=load.cluster,
        gpus=plan.world_size,
        global_batch=load.global_batch,
        samples=load.samples or 1 if load.global_batch is None else plan.local_batch(load.global_batch),
        dtype=plan.dtype,
        fixed={} if load.global_batch is not None else {"micro_batches": plan.micro_batches},
        encoders=load.encoders,
    )


def run(*, plan: str, asked: Asked, as_json: bool) -> None:
    """Play the whole step of a plan, and say what it is made of and what beats it.

    Raises CinemeshError for what is no plan, and for a plan that the model, the batch or the cluster cannot have.
    """
    (chosen,), load = plans_asked([plan], asked)
    request = asked_of(chosen, load)
    with progress("explaining", PIECES, silent=as_json) as begin:
        step, reasons = _reasons(request, chosen, begin)
        begin("pricing other software")
        kernels, others = _software(request, step)
    if as_json:
        told = ExplainReply(
            schema=Schema(name="explain"),
            model=load.model,
            cluster=request.cluster.name,
            **vars(played_plan(request, step)),
            rival=None if reasons.rival is None else played_plan(request, reasons.rival),
            why=reasons.told,
            start_up=start_up_cost(chosen, request.cluster),
            kernels=kernels,
            other_software=others,
            error_bar=explain.error_bar_of(request),
            taken=load.taken,
            order=request.cluster.order_told(),
        )
        print(reply.text(told))
        return
    console = new_console()
    print_taken(console, load)
    console.print(heading(request))
    console.print(f"{describe(chosen)}: {summary_line(request, step)}")
    print_kernels(console, kernels)
    print_order(console, request.cluster.order_told())
    print_others(console, step.step_s, others)
    console.print(explain.error_bar_of(request).text)
    reasons.print(console)


def _reasons(request: Request, chosen: Plan, begin: Begin) -> tuple[PlayedStep, Reasons]:
    """The whole step of a plan, and what it is held against."""
    evaluator = Evaluator(request)
    begin("playing the whole step")
    (step,) = evaluator.play_held(chosen, request.samples)
    begin("looking for a better plan")
    found = survey(replace(request, shown=2))
    rivals = [choice for choice in found.choices if choice.plan != chosen]
    begin("playing its whole step")
    rival = evaluator.play_held(rivals[0].plan, rivals[0].samples)[0] if rivals else None
    begin("playing it on faster hardware")
    faster = list(explain.on_faster(request, step))
    begin("pricing alternatives")
    return step, Reasons.of(request, step, rival, faster)


def _software(request: Request, step: PlayedStep) -> tuple[list[PricedKernel], list[OtherSoftware]]:
    """The attention kernels that a step is priced on, and the step with other software."""
    cluster, config, dtype = request.cluster, request.config, step.plan.compute_dtype

    def price(other: Cluster) -> float:
        evaluator = Evaluator(replace(request, cluster=other))
        return evaluator.play_held(step.plan, step.batch.samples)[0].step_s

    return kernels_of(cluster, config, dtype), other_software(cluster, config, dtype, step.step_s, price)


def heading(request: Request) -> str:
    """What is predicted, in a line."""
    config, latent = request.config, request.buckets[0].latent
    shape = f"{'x'.join(map(str, latent))} ({config.tokens(latent):,} tokens)"
    return f"{config.name} on {request.cluster.name}, {shape}. Predicted, not measured."


def played_plan(request: Request, step: PlayedStep) -> PlayedPlan:
    """One step's numbers, as ``--json`` prints them."""
    memory, exposed_s, bar = step.footprint, step.timeline.total_exposed_s, explain.error_bar_of(request)
    return PlayedPlan(
        plan=step.plan.to_dict(),
        gpus=step.plan.world_size,
        samples=step.batch.samples,
        global_batch=step.samples,
        step_s=step.step_s,
        step_s_low=step.step_s * (1.0 + bar.low),
        step_s_high=step.step_s * (1.0 + bar.high),
        samples_per_s=step.samples / step.step_s,
        mfu=explain.mfu(step, request.cluster),
        hfu=explain.hfu(step, request.cluster),
        compute_s=step.tape.compute_s,
        exposed_s=exposed_s,
        exposed_fraction=exposed_s / step.step_s,
        peak_bytes=memory.peak_bytes,
        limit_bytes=memory.limit_bytes,
        fits=memory.peak_bytes <= memory.limit_bytes,
        host_bytes=memory.host_bytes,
        gpu_s_per_sample=step.gpu_s_per_sample,
        terms=explain.terms(step),
    )


def summary_line(request: Request, step: PlayedStep) -> str:
    """The same in a line."""
    memory = step.footprint
    fits = "" if memory.peak_bytes <= memory.limit_bytes else ": IT DOES NOT FIT"
    return (
        f"{digits(step.step_s, 3)} s a step of {step.samples:,} samples, "
        f"{digits(step.samples / step.step_s, 1)} samples/s, "
        f"MFU {explain.mfu(step, request.cluster):.1%}, {memory.peak_bytes / 1e9:.1f} of "
        f"{memory.limit_bytes / 1e9:.1f} GB{fits}"
    )
