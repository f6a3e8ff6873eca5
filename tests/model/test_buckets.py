"""Several shapes on one set of weights: bucket by bucket the same steps as a runner of that shape alone."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.parity import OPTIMIZER, Case, global_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.memory import uncollected
from cinemesh.model import weights
from cinemesh.model.blueprint import Blueprint
from cinemesh.model.buckets import BucketRunner
from cinemesh.model.config import CAPTION_DROPOUT
from cinemesh.model.inputs import BatchShape
from cinemesh.model.runner import StepRunner
from cinemesh.parallel.ir.plan import Plan

STATES = ("master", "exp_avg", "exp_avg_sq", "ema", "counters")


def cases() -> list[Case]:
    """The same model at two latents, of the smaller one three times the samples."""
    case = small_case(Plan(dtype="float32"))
    t, h, w = case.latent
    return [case, replace(case, latent=(t, h, w // 2), samples=3 * case.samples)]


def load(case: Case, runner: StepRunner | BucketRunner, step: int) -> None:
    runner.load(0, global_batch(case, step, 0))


def bucket_runner(shapes: list[Case]) -> BucketRunner:
    return BucketRunner([blueprint(case, case.batch) for case in shapes], None)


def blueprint(case: Case, batch: BatchShape) -> Blueprint:
    return Blueprint(case.config, case.plan, batch, OPTIMIZER, case.seed, CAPTION_DROPOUT, "gloo", marked=False)


@pytest.mark.parametrize("mode", ["off", "required"])
def test_buckets_in_turn_are_the_steps_of_each_shape(mode: str) -> None:
    shapes = cases()
    buckets = bucket_runner(shapes)
    buckets.first.initialise(weights.probe_values(0))
    assert buckets.capture("required" if mode == "required" else "off") is None
    alone = [StepRunner(c.config, c.plan, c.batch, OPTIMIZER, None, seed=c.seed) for c in shapes]
    state: dict[str, Tensor] = {name: buckets.buffers[name].clone() for name in STATES}
    for step in range(4):
        case, runner = shapes[step % 2], alone[step % 2]
        for name, value in state.items():
            runner.buffers[name].copy_(value)
        for each in (buckets, runner):
            load(case, each, step)
            each.step(1e-2)
        state = {name: runner.buffers[name].clone() for name in STATES}
        for name in STATES:
            assert torch.equal(buckets.buffers[name], state[name]), f"step {step}: {name}"
    assert state["counters"].tolist() == [4, 4]


def test_no_collector_looks_at_records_while_more_are_made() -> None:
    """It would run some hundred times, over all of them; behind it, it is as it was."""
    ran = list[str]()

    def noted(phase: str, _: object) -> None:
        ran.append(phase)

    gc.callbacks.append(noted)
    try:
        with uncollected():
            kept = [[i] for i in range(10_000)]
            with pytest.raises(ValueError, match="inside"), uncollected():
                raise ValueError("inside")
            assert not gc.isenabled(), "as it was before: off"
            bucket_runner(cases())
            assert ran == []
        assert gc.isenabled() and len(kept) == 10_000
        gc.collect()
        ran.clear()
        bucket_runner(cases())
        assert len(ran) <= 4, "what the cases make, and the first one behind"
        with pytest.raises(CinemeshError), uncollected():
            bucket_runner([cases()[0], cases()[0]])
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(noted)


def test_one_arena_as_large_as_the_largest_needs() -> None:
    buckets = bucket_runner(cases())  # the one that needs less is named first
    arenas = {id(runner.executor.arena) for runner in buckets.runners.values()}
    needs = [runner.executor.placement.total_bytes for runner in buckets.runners.values()]
    assert len(arenas) == 1 and buckets.first.executor.arena.numel() == max(needs) > min(needs)


def test_count_and_bytes_are_reported() -> None:
    buckets = bucket_runner(cases())
    assert buckets.report().startswith("2 buckets, 0 captured steps; one arena of ")
    buckets.first.initialise(weights.probe_values(0))
    buckets.capture("required")
    assert buckets.report().startswith("2 buckets, 2 captured steps; one arena of ")


def test_a_shape_without_a_bucket_is_refused() -> None:
    shapes = cases()
    buckets = bucket_runner(shapes)
    stranger = replace(shapes[0], latent=(3, 4, 4))
    with pytest.raises(CinemeshError, match=r"latents 3x4x4 has no bucket; buckets are 3x4x6, 3x4x12: .* name it then"):
        load(stranger, buckets, 0)
    with pytest.raises(CinemeshError, match=r"latents 3x4x4 for a step that was built for 3x4x6"):
        load(stranger, buckets.first, 0)
    with pytest.raises(CinemeshError, match="each latent once"):
        BucketRunner([blueprint(shapes[0], BatchShape(samples, (3, 4, 12))) for samples in (2, 1)], None)
