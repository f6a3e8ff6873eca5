"""Stage 5: how much of every lane's communication compute hides, from a trace of steps, beside what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ...parallel.ir.program import Program
from ...parallel.ir.records import COMPUTE_LANE
from ...parallel.ir.span import Span
from ...parallel.runtime.comm import gather_objects
from ...perf_model.clusters.cluster import load
from ...perf_model.prices.played import play_program
from ...perf_model.report.trace import predicted
from ..cluster.processes import Joined
from ..proof.parity import Case
from ..proof.traced import taken_steps
from .here import SAID, Here, mesh_of
from .prices import priced_on
from .steps import fill_inputs, plans_of, runner_of, timed_case

STEPS = 3


def run(here: Here) -> None:
    """Every plan traced, on all ranks."""
    with here.joined() as place:
        cluster = load(priced_on(here.asked, place.device))
        rows: list[dict[str, Any]] = []
        for name, plan in plans_of(here.world, here.local).items():
            here.at(f"{name}: {plan.equation()}")
            case = timed_case(plan, place.device, STEPS)
            lanes, program = _traced(place, case)
            everyones: Any = gather_objects(lanes)
            if here.rank > 0:
                continue
            whole = lanes_of(predicted(play_program(program, case.batch, cluster)), 1)
            rows += [
                _row(name, plan.equation(), lane, [of[lane] for of in everyones], whole.get(lane)) for lane in lanes
            ]
            names = dict.fromkeys(row["name"] for row in rows)
            shares = ", ".join(f"{name} {hidden_of(rows, name):.0%}" for name in names)
            said = f"compute hides of all communication: {shares}" if shares else "one rank has no lanes"
            here.note(lanes=rows, cluster=cluster.name, **{SAID: said})


def _traced(place: Joined, case: Case) -> tuple[dict[str, dict[str, float]], Program]:
    """This rank's lanes, and the program that ran; the memory of the runner is given back."""
    with mesh_of(case.plan, place) as mesh:
        runner = runner_of(case, mesh, place.device)
        fill_inputs(runner, case.seed)
        return lanes_of(taken_steps(runner, STEPS).spans, STEPS), runner.program


def _row(
    name: str, plan: str, lane: str, everyones: Sequence[dict[str, float]], whole: dict[str, float] | None
) -> dict[str, Any]:
    """Of one lane, the means of all ranks, and the rank on which least is hidden."""
    shares = [of["hidden"] for of in everyones]
    return {
        "name": name,
        "plan": plan,
        "lane": lane,
        "collectives": everyones[0]["count"],
        "ran_s": fmean(of["ran_s"] for of in everyones),
        "exposed_s": fmean(of["exposed_s"] for of in everyones),
        "hidden": {"predicted": whole and whole["hidden"], "measured": fmean(shares)},
        "least": min(shares),
        "least_on": shares.index(min(shares)),
    }


def hidden_of(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Over all lanes of a plan."""
    own = [row for row in rows if row["name"] == name]
    return max(0.0, 1.0 - sum(row["exposed_s"] for row in own) / sum(row["ran_s"] for row in own))


def lanes_of(spans: Sequence[Span], steps: int) -> dict[str, dict[str, float]]:
    """By lane, of one step: collectives, seconds that they ran and that compute waited for, and the share hidden."""
    found: dict[str, dict[str, float]] = {}
    for lane in dict.fromkeys(span.lane for span in spans if span.lane != COMPUTE_LANE):
        own = [span for span in spans if span.lane == lane]
        ran, exposed = sum(span.ran_s for span in own) / steps, sum(span.exposed_s for span in own) / steps
        hidden = 1.0 - exposed / ran if ran else 1.0
        found[lane] = {"count": len(own) // steps, "ran_s": ran, "exposed_s": exposed, "hidden": hidden}
    return found
