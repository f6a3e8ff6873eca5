"""``cinemesh plan --paper``: every row, the best plan beside it, GPU hours and neutral batches."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.launch.cli import app
from cinemesh.launch.commands import paper
from cinemesh.launch.commands.reply import PaperReply, PaperTable
from cinemesh.model.config import preset
from cinemesh.model.reference import Reference
from cinemesh.parallel.ir.flops import model_flops
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.startup import hosts_start, start_up
from cinemesh.perf_model.published.paper import Stage
from cinemesh.perf_model.search.evaluator import Evaluator
from cinemesh.perf_model.search.request import LatentBucket, Request

from .test_reply import wrong

NEAR = 0.7  # steps of so small a model wait for communication: batches are far apart
SMALL, WIDE = (3, 4, 12), (3, 4, 8)
STAGES = (
    Stage("small", SMALL, 2, 1, 1, 8, 4, 1e-4, 9000),
    Stage("small", SMALL, 2, 1, 1, 8, 4, 5e-5, 900),
    Stage("small", SMALL, 2, 2, 2, 8, 4, 1e-5, 90),
    Stage("wide", WIDE, 1, 2, 3, 4, 6, 1e-5, 1000),
)


def printed(*asked: str, stages: tuple[Stage, ...] = STAGES) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "STAGES", stages)
        patch.setattr(paper, "NEAR", NEAR)
        done = CliRunner().invoke(app, ["plan", "--paper", "--model", "tiny", *asked])
    assert done.exit_code == 0, done.exception
    return done.stdout


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return json.loads(printed("--json"))


def test_rows_are_whole_plays_of_the_paper_s_plans_beside_better_ones(told: dict[str, Any]) -> None:
    """Times, MFU and GPU hours by the play of every record; the best plan has the row's own GPUs and batch."""
    assert [*wrong(told, PaperReply)] == [] and len(told["stages"]) == len(STAGES)
    config, cluster = preset("tiny"), load("grand-teton-h100")
    for stage, row in zip(STAGES, told["stages"], strict=True):
        request = Request(config, (LatentBucket(stage.latent),), cluster, stage.gpus)
        for whose in ("paper", "best"):
            plan = Plan.from_dict(row[whose]["plan"])
            (whole,) = Evaluator(request).play(plan, row[whose]["samples"])
            assert row[whose]["step_s"] == pytest.approx(whole.step_s, rel=1e-3)
            could = whole.step_s * stage.gpus * cluster.gpu.peak_flops["bfloat16"]
            assert row[whose]["mfu"] == pytest.approx(model_flops(whole.program) / could, rel=1e-3)
            hours = row[whose]["step_s"] * stage.steps * stage.gpus / 3600
            assert row[f"{whose}_gpu_hours"] == pytest.approx(hours, rel=1e-12)
            assert (row[whose]["gpus"], row[whose]["global_batch"]) == (stage.gpus, stage.global_batch)
        theirs = row["paper"]["plan"]
        assert (theirs["tp"], theirs["cp"], theirs["dp_replicate"]) == (stage.tp, stage.cp, 1)
        assert row["paper"]["samples"] == stage.samples and row["best_over_paper"] >= 1.0
    for whose in ("paper", "best"):
        assert told[f"{whose}_gpu_hours"] == sum(row[f"{whose}_gpu_hours"] for row in told["stages"])


def test_neutral_batches_are_within_the_error_and_of_one_job(told: dict[str, Any]) -> None:
    """Plans of other GPUs or shapes cannot be compared; one plan a batch, and two batches at least."""
    assert [(job["stage"], job["gpus"]) for job in told["neutral"]] == [("small", 8), ("wide", 4)]
    groups = [(job, group) for job in told["neutral"] for group in job["groups"]]
    assert groups, "none was found: the test looks at nothing"
    for job, group in groups:
        rates = [plan["samples_per_s"] for plan in group]
        assert min(rates) >= (1 - told["near"]) * max(rates)
        assert len({plan["global_batch"] for plan in group}) == len(group) > 1
        assert {plan["gpus"] for plan in group} == {job["gpus"]}


def test_what_changes_from_a_row_to_the_next_is_all_that_differs(told: dict[str, Any]) -> None:
    """A field that is left out would be found at the restart; states are four float32 a weight of the plain model."""
    assert [row["relaunch"] is None for row in told["stages"]] == [True, True, True, False]
    weights = sum(weight.numel() for weight in Reference(preset("tiny")).parameters())
    for before, row in pairwise(told["stages"]):
        old, new, relaunch = before["best"]["plan"], row["best"]["plan"], row["relaunch"]
        differ = {name for name in old if old[name] != new[name]}
        if relaunch is None:
            assert differ == set()
            continue
        said = [change[side].split(", ") for change in relaunch["changes"] for side in ("before", "after")]
        assert {field.partition("=")[0] for fields in said for field in fields} == differ
        ranks = row["gpus"] // new["dp_replicate"]
        assert relaunch["state_bytes"] == 16 * weights and relaunch["rank_bytes"] * ranks >= 16 * weights
        of = Plan.from_dict(new), load("grand-teton-h100")
        hosts = hosts_start(*of)
        assert relaunch["start_up_s"] == sum(each.seconds for each in start_up(*of)) + (hosts.seconds if hosts else 0)


def test_the_text_is_the_data(told: dict[str, Any]) -> None:
    """Alone, and below a search, where --json has it under a key."""
    text = printed()
    lines = [line.split() for line in text.splitlines()]
    for number, row in enumerate(told["stages"], 1):
        place = next(i for i, words in enumerate(lines) if words[:2] == [str(number), row["stage"]])
        for at, whose in ((place, "paper"), (place + 1, "best")):
            plan: dict[str, Any] = row[whose]
            rate, mfu, peak = f"{plan['samples_per_s']:,.1f}", f"{plan['mfu']:.1%}", f"{plan['peak_bytes'] / 1e9:.1f}"
            hours = f"{row[f'{whose}_gpu_hours']:,.0f}"
            assert lines[at][-5:] == [f"{plan['step_s']:#.3g}", rate, mfu, peak, hours]
    assert (
        f"{told['paper_gpu_hours']:,.0f} GPU hours with the paper's degrees, {told['best_gpu_hours']:,.0f} with" in text
    )
    assert "\nfrom row 1 to 2: the best plan stays\n" in text and "\nfrom row 3 to 4: dp_" in text
    beside = ("--gpus", "8", "--samples", "1", "--latent", "2x8x8", "--top", "1")
    below = printed(*beside, stages=STAGES[-1:])
    inner = json.loads(printed(*beside, "--json", stages=STAGES[-1:]))["paper"]
    assert [*wrong(inner, PaperTable)] == [] and inner["stages"] == [told["stages"][-1] | {"relaunch": None}]
    assert below.startswith("tiny on 8 GPUs") and f"{inner['paper_gpu_hours']:,.0f} GPU hours with" in below


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((), "for how many GPUs is not said; add --gpus 6144, or ask for the paper's plans alone: --paper"),
        (("--paper", "--tune", "--out", "best.yaml"), "--tune, --out: of a search, and for how many GPUs is not said"),
        (("--paper", "--cluster", "local-cpu"), "1536 GPUs > "),
    ],
)
def test_what_has_no_answer_is_refused(asked: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", *asked])
    assert isinstance(done.exception, CinemeshError) and said in str(done.exception)
