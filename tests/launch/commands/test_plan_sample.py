"""The price of one clip: every way to share it, the fastest first, as the program itself is priced."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from cinemesh.launch.cli import app
from cinemesh.model.config import preset
from cinemesh.model.forward import build_velocity
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.played import play_program
from cinemesh.perf_model.search.sampling import ways

SHAPE = ("plan", "--sample", "--model", "tiny", "--latent", "2x8x8")


def told(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*SHAPE, *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_way_of_so_many_ranks_is_priced() -> None:
    shared = [(plan.tp, plan.cp, plan.dp_replicate) for plan, _ in ways(8, "bf16")]
    assert shared == [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2)]
    assert [guidance for _, guidance in ways(3, "bf16")] == ["batch"] * 2  # no two equal groups of three


def test_the_fastest_comes_first_and_is_played_whole() -> None:
    (clip,) = told("--gpus", "4")["clips"]
    times = [plan["clip_s"] for plan in clip["plans"]]
    assert times == sorted(times) and clip["gpus"] == 4 and len(times) > 3
    models = load("grand-teton-h100")
    for given in clip["plans"]:
        plan, apart = Plan.from_dict(given["plan"]), given["guidance"] == "groups"
        batch = BatchShape(1 if apart else 2, (2, 8, 8))
        program = prepare(build_velocity(preset("tiny"), plan, batch, apart=apart), backend="nccl")
        played = play_program(program, batch, models)
        assert given["velocity_s"] == pytest.approx(played.step_s)
        assert given["clip_s"] == pytest.approx(50 * played.step_s)
        assert given["peak_bytes"] == played.footprint.peak_bytes


def test_without_a_number_it_is_8_and_16() -> None:
    done = CliRunner().invoke(app, [*SHAPE[:-1], "4x8x8"])
    assert done.exit_code == 0, done.output
    assert "on 8 GPUs" in done.stdout and "on 16 GPUs" in done.stdout and "Predicted, not measured" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tune"], "--tune: of a search for training plans"),
        (["--gpus", "7"], "no tp and cp over 7 GPUs divide the model and the latent"),
        (["--global-batch", "8"], "--global-batch"),
    ],
)
def test_what_is_no_price_of_a_clip_is_refused(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, [*SHAPE, *arguments])
    assert said in str(done.exception)
