"""What other software would give a step is that step played there, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.kernels.selection import Software
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.report.software import kernels_of, other_software

MODEL = replace(preset("movie-gen-5b"), layers=1)
PLAN, BATCH = Plan(tp=2, dp_shard=2), BatchShape(1, (8, 48, 48))
PAPER = load("grand-teton-h100")


def step_s(cluster: Cluster) -> float:
    return play_step(MODEL, PLAN, BATCH, PriceModels.of(cluster)).step_s


def told(cluster: Cluster) -> dict[str, float]:
    found = other_software(cluster, MODEL, "bfloat16", step_s(cluster), step_s)
    return {other.name: other.step_s for other in found}


def test_packages_that_are_faster_and_what_determinism_costs() -> None:
    """FlashAttention 2 and apex are left out: the registry would not choose them beside cuDNN and our own kernels."""
    found, now = told(PAPER), step_s(PAPER)
    assert [*found] == ["flash-attn-3", "flash-attn-4", "deterministic"]
    assert found["flash-attn-3"] == step_s(PAPER.with_packages(["fa3"])) < found["flash-attn-4"] < now
    assert found["deterministic"] == step_s(PAPER.running(Software(deterministic=True))) > now


def test_what_is_there_already_is_not_offered() -> None:
    assert [*told(PAPER.with_packages(["fa3"]))] == ["deterministic"]  # FlashAttention 4 is slower on Hopper
    assert [*told(PAPER.running(Software(deterministic=True)))] == ["flash-attn-3", "flash-attn-4"]
    assert told(load("local-cpu")) == {}


def test_the_kernels_are_named_with_what_they_promise() -> None:
    """Determinism and guesses are of each direction by itself."""
    shown = {kernel.op: kernel for kernel in kernels_of(PAPER, MODEL, "bfloat16")}
    assert {op: kernel.package for op, kernel in shown.items()} == {
        "attention": "cudnn",
        "attention_backward": "cudnn",
        "cross_attention": "triton",
        "cross_attention_backward": "triton",
    }
    assert [kernel.deterministic for kernel in shown.values()].count(False) == 1
    assert not shown["attention_backward"].deterministic and "in any order" in str(shown["attention_backward"])
    four = {kernel.op: kernel for kernel in kernels_of(PAPER.with_packages(["fa4"]), MODEL, "bfloat16")}
    assert not shown["attention"].guessed and four["attention_backward"].guessed, "no GPU has run it on this chip"
    asked = kernels_of(PAPER.running(Software({}, deterministic=True)), MODEL, "bfloat16")
    assert all(kernel.deterministic for kernel in asked) and "flash-attn-3" in {kernel.package for kernel in asked}
    with pytest.raises(CinemeshError, match="kernel override attention=flash-attn-3"):
        kernels_of(PAPER.running(Software(overrides={"attention": "flash-attn-3"})), MODEL, "bfloat16")
