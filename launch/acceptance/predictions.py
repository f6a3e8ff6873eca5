"""Stage 6: the times of steps beside what the cost model predicts, as rows that ``cinemesh validate`` reads."""

from __future__ import annotations

import time
from typing import Any

import torch

from ...kernels.selection import Software
from ...model.config import latent_text
from ...model.runner import StepRunner
from ...perf_model.acceptance import STEP_ROWS
from ...perf_model.published.own_rows import OwnPrediction, predict_own
from ..cluster.processes import Joined
from ..proof.parity import LR, Case
from ..training.measured_rows import StepTimes, dated, own_row
from .here import SAID, Here, mesh_of
from .prices import priced_on
from .steps import fill_inputs, plans_of, runner_of, timed_case

STEPS = 10  # timed, behind the warm-up


def run(here: Here) -> None:
    """Every plan timed and priced."""
    with here.joined() as place:
        cluster = priced_on(here.asked, place.device)
        rows: list[dict[str, Any]] = []
        beside: list[dict[str, Any]] = []
        for name, plan in plans_of(here.world, here.local).items():
            here.at(f"{name}: {plan.equation()}")
            case = timed_case(plan, place.device, STEPS)
            row = _row(here, place, case, name, cluster)
            if here.rank > 0:
                continue
            rows.append(row)
            told = predict_own(f"row {row['id']}", listed(row), cluster)
            beside.append({"name": name, "plan": plan.equation(), **_beside(told)})
            said = ", ".join(f"{of['name']} {of['predicted_over_measured']:.2f}" for of in beside)
            here.note(**{STEP_ROWS: rows, "beside": beside, SAID: f"predicted over measured on {cluster}: {said}"})


def _row(here: Here, place: Joined, case: Case, name: str, cluster: str) -> dict[str, Any]:
    with mesh_of(case.plan, place) as mesh:
        runner = runner_of(case, mesh, place.device)
        why_not = runner.capture("auto")
        measured = _measured(runner)
        title = f"acceptance of {here.world} ranks"
        row = own_row(
            runner, Software.here(), cluster, name=f"acceptance/{name}/{latent_text(case.latent)}", title=title
        )
    notes = None if why_not is None else f"not captured: {why_not}"
    return dated(row, place.device) | {"measured": measured, "notes": notes}


def _measured(runner: StepRunner) -> dict[str, Any]:
    """Steps behind a warm-up, each until its loss is there."""
    times = StepTimes()
    while len(times.step_s) < STEPS:
        begun = time.perf_counter()
        fill_inputs(runner, times.begun)
        if runner.executor.device != "cpu":
            torch.cuda.synchronize()
        loaded = time.perf_counter()
        runner.step(LR)
        runner.loss.item()
        times.add(time.perf_counter() - loaded, loaded - begun)
    measured = times.measured()
    assert measured is not None
    return measured


def listed(value: Any) -> Any:
    """As a file has it: lists where Python has tuples."""
    if isinstance(value, dict):
        return {name: listed(item) for name, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


def _beside(told: OwnPrediction) -> dict[str, Any]:
    measured_s, (low_s, high_s) = told.row.measured.iter_time_s, told.span
    return {
        "measured_s": measured_s,
        "predicted_s": told.predicted_s,
        "predicted_over_measured": told.ratio,
        "bar_s": [low_s, high_s],
        "within": told.within,
    }
