"""``cinemesh explain`` and ``cinemesh compare``: every number is that of a whole step, played again here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.commands.compare import changes
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.played import PlayedStep, play_step
from cinemesh.perf_model.report.exchanges import exchanges
from cinemesh.perf_model.report.explain import exposures, terms

CONFIG, LATENT, CLUSTER = preset("tiny"), (4, 12, 12), load("grand-teton-h100")
SHAPE = ("--model", "tiny", "--latent", "4x12x12")
FIRST = Plan(tp=2, dp_shard=8, recompute="full")


def cinemesh(*args: str, code: int = 0) -> str:
    ran = CliRunner().invoke(app, args)
    assert ran.exit_code == code, (ran.output, ran.exception)
    return ran.stdout


def played(plan: Plan, samples: int = 1) -> PlayedStep:
    return play_step(CONFIG, plan, BatchShape(samples, LATENT), CLUSTER)


def test_explain_plays_the_plan_it_is_given_as_text_or_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(FIRST.to_yaml())
    told = json.loads(cinemesh("explain", "tp=2,dp_shard=8,recompute=full", *SHAPE, "--json"))
    assert told == json.loads(cinemesh("explain", str(path), *SHAPE, "--json"))
    step = played(FIRST)
    assert Plan.from_dict(told["plan"]) == FIRST
    assert (told["step_s"], told["peak_bytes"]) == (step.step_s, step.footprint.peak_bytes)
    assert told["terms"] == terms(step) and sum(told["terms"].values()) == pytest.approx(step.step_s)
    exposed = [row for row in exposures(step) if row.exposed_s > 0]
    assert [row["exposed_s"] for row in told["why"]["exposed"]] == [row.exposed_s for row in exposed]
    assert sum(loss["share"] for loss in told["why"]["waterfall"]) == pytest.approx(1.0 - told["mfu"], abs=1e-9)
    assert told["why"]["exchanges"] == [] and [row["runs"] for row in told["why"]["float8"]] == [False, False]
    for row in told["why"]["sensitivities"]:
        assert Plan.from_dict(row["plan"]) == FIRST and row["gain"] > -1e-3


def test_explain_says_what_beats_the_plan_and_what_it_beats(tmp_path: Path) -> None:
    """The planner's own best plan has the runner-up beside it, any other plan the best one."""
    path = tmp_path / "best.yaml"
    cinemesh("plan", "--gpus", "16", *SHAPE, "--out", str(path))
    best = Plan.from_dict(json.loads(cinemesh("explain", str(path), *SHAPE, "--json"))["plan"])
    assert "why the runner-up lost" in cinemesh("explain", str(path), *SHAPE)
    worse = json.loads(cinemesh("explain", "tp=2,dp_shard=8,recompute=full", *SHAPE, "--json"))
    assert Plan.from_dict(worse["rival"]["plan"]) == best
    assert worse["rival"]["samples_per_s"] > worse["samples_per_s"]
    assert "where it loses to " in cinemesh("explain", "tp=2,dp_shard=8,recompute=full", *SHAPE)


def test_explain_shows_what_the_design_gives_away() -> None:
    """Each with its step, or with why it has none; that none of it runs here is said."""
    asked = ("explain", "tp=2,cp=2,dp_shard=2", *SHAPE)
    told = json.loads(cinemesh(*asked, "--json"))["why"]["exchanges"]
    step = played(Plan(tp=2, cp=2, dp_shard=2))
    assert told == [asdict(row) for row in exchanges(step, CONFIG, CLUSTER)]
    gather, ulysses, ring = told
    assert gather["runs"] and not ulysses["runs"] and "heads(6) % (tp(2) * cp(2))" in ulysses["problem"]
    text = cinemesh(*asked)
    assert f"no {ulysses['name']}: {ulysses['problem']}" in text and f"{ring['step_s']:.3f}" in text
    assert text.count("priced but not runnable here") == 2 and "fp8 rates: gpu.peak_flops 1978.9" in text


def test_a_plan_that_does_not_fit_says_so() -> None:
    big = ("explain", "tp=4,cp=2,dp_shard=768", "--json")
    assert json.loads(cinemesh(*big))["fits"] is False
    assert json.loads(cinemesh("explain", "tp=4,cp=2,dp_shard=768,recompute=full", "--json"))["fits"] is True


def test_compare_prices_each_difference_alone() -> None:
    """Against whole steps of the changed plans; what they do not explain together is told too."""
    other = Plan(cp=2, tp=2, dp_shard=4, recompute="none", tp_slices=2)
    asked = ("compare", "tp=2,dp_shard=8,recompute=full", "tp=2,cp=2,dp_shard=4,recompute=none,tp_slices=2")
    told = json.loads(cinemesh(*asked, *SHAPE, "--samples", "2", "--json"))
    steps = [played(plan, 2) for plan in (FIRST, other)]
    assert [row["step_s"] for row in told["plans"]] == [step.step_s for step in steps]
    assert [row["global_batch"] for row in told["plans"]] == [16, 8]
    (against,) = told["against_the_first"]
    gain = steps[1].gpu_s_per_sample / steps[0].gpu_s_per_sample - 1.0
    assert against["gain"] == gain
    alone = {
        "degrees": FIRST.with_degrees(tp=2, cp=2, dp_shard=4),
        "recompute": replace(FIRST, recompute="none"),
        "tp_slices": replace(FIRST, tp_slices=2),
    }
    found = {row["name"]: row["gain"] for row in against["differences"]}
    cost = steps[0].gpu_s_per_sample
    assert found == {name: played(plan, 2).gpu_s_per_sample / cost - 1.0 for name, plan in alone.items()}
    assert against["together"] == pytest.approx(gain - sum(found.values()))


def test_compare_says_what_cannot_be_changed_alone() -> None:
    asked = ("compare", "tp=2,dp_shard=8", "tp=2,cp=2,dp_shard=4,kv_slices=3", *SHAPE)
    (against,) = json.loads(cinemesh(*asked, "--json"))["against_the_first"]
    row = next(row for row in against["differences"] if row["name"] == "kv_slices")
    assert row["gain"] is None and "kv_slices(3) with cp(1)" in row["problem"]
    text = cinemesh(*asked)
    assert "kv_slices cannot be changed alone: plan: kv_slices(3) with cp(1)" in text and "not alone" in text


def test_compare_of_a_given_batch_deals_it_to_each_plan() -> None:
    asked = ("compare", "tp=2,dp_shard=8", "tp=2,cp=2,dp_shard=4", *SHAPE, "--global-batch", "16", "--json")
    told = json.loads(cinemesh(*asked))
    assert [(row["samples"], row["global_batch"]) for row in told["plans"]] == [(2, 16), (4, 16)]


def test_what_differs_is_every_field_once() -> None:
    other = Plan(cp=2, micro_batches=2, recompute=("o",), recompute_last="none", last_blocks=1, prefetch=2, sm_margin=4)
    assert dict(changes(Plan(), other)).keys() == {"degrees", "micro_batches", "recompute", "prefetch", "sm_margin"}
    assert list(changes(other, other)) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("compare", "tp=2"), "compare: 1 plan given"),
        (("compare", "tp=2,dp_shard=8", "tp=7"), r"heads\(6\) % tp\(7\)"),
        (("compare", "tp=2", "nowhere.yaml"), "cannot read the plan nowhere.yaml"),
        (("explain", "dp_shard=12288"), "12288 GPUs > 6144"),
        (("explain", "dp_shard=2", "--global-batch", "3"), r"global batch\(3\)"),
    ],
)
def test_what_cannot_be_priced_is_one_message(args: tuple[str, ...], told: str) -> None:
    with pytest.raises(CinemeshError, match=told):
        CliRunner().invoke(app, [*args, *SHAPE], catch_exceptions=False)
