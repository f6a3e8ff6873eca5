"""Predicted goodput beside that of a job whose ranks are killed: ``python tests/benchmarks/goodput_against_kills.py``.

Two gloo ranks under torch's elastic agent. An undisturbed job tells what a step takes, with all that comes back with
every step (loading, reports), and what training waits for a checkpoint; a job with a few kills, what a kill costs until
the next step. From these alone ``perf_model/prices/goodput.py`` predicts what of a run's time is training, with a
checkpoint every so many steps as it proposes, for failures that a seed draws. Then a job is killed at those moments.
What it lost to them and to checkpoints is what its own account says (``goodput.json``): a machine that is slower for a
minute has longer steps, and loses no more to failures. Writes ``results/goodput_against_kills.json``; some 6 minutes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cinemesh.perf_model.prices.goodput import DAY_S, Conditions, proposed_steps, simulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from elastic_job import Fault, Job, run_job
from training import recipe, write_clips

RESULT = Path(__file__).parent / "results" / "goodput_against_kills.json"
MTBF_S, SEED = 15.0, 3
MOST_KILLS = 60  # more than happen
ALONE, FEW_S, LASTS_S = 4000, 80.0, 180.0  # steps of the undisturbed job; seconds of training of those that are killed
OF_FAILURES = ("down", "start", "redone", "checkpoint")  # what comes back with every step is of the step
WITHIN = 0.02  # of a run's time


def values(clips: Path, folder: Path, steps: int, every: int) -> dict[str, Any]:
    """A recipe of so many steps, with a checkpoint every so many."""
    of = recipe(clips, folder, dp_shard=2)
    of["schedule"] |= {"steps": steps}
    of["logging"] |= {"every": 10, "validate_every": 0, "checkpoint_every": every}
    return of


def moments(seed: int, count: int) -> list[Fault]:
    """Kills, each so many seconds after a life begins to train: as ``simulate`` draws its failures."""
    draw = random.Random(seed)
    found: list[Fault] = []
    for number in range(count):
        found.append(Fault(number % 2, "kill", "moment", part=draw.expovariate(1.0 / MTBF_S)))
        _ = draw.random(), draw.random()  # whether it hangs, whether it takes a node
    return found


def account(folder: Path) -> dict[str, Any]:
    """What the run itself says of its time."""
    return json.loads((folder / "run" / "goodput.json").read_text())


def done(job: Job) -> Job:
    """Raises AssertionError where the job did not end well."""
    assert job.code == 0, job.told
    return job


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        write_clips(top)
        done(run_job(top / "alone", values(top, top / "alone", ALONE, 20), []))
        alone = account(top / "alone")
        lost_s = alone["lost_s"]
        step_s = (alone["until"] - alone["begun"] - lost_s["start"] - lost_s["checkpoint"]) / alone["steps"]
        pause_s = lost_s["checkpoint"] / (ALONE / 20)
        few = moments(SEED + 1, 5)
        job = done(run_job(top / "few", values(top, top / "few", round(FEW_S / step_s), 20), few))
        lost_s = account(top / "few")["lost_s"]
        restart_s = (lost_s["down"] + lost_s["start"] - alone["lost_s"]["start"]) / len(job.fired)
        conditions = Conditions(
            step_s=step_s,
            mtbf_s=MTBF_S,
            pause_s=pause_s,
            write_s=pause_s,
            notice_s=0.0,
            hang_s=0.0,
            hang_fraction=0.0,
            restart_s=restart_s,
            node_fraction=0.0,
            repair_s=0.0,
        )
        every = proposed_steps(conditions)
        steps, kills = round(LASTS_S / step_s), moments(SEED, MOST_KILLS)
        job = done(run_job(top / "killed", values(top, top / "killed", steps, every), kills))
        own = account(top / "killed")
        lasted_s = own["until"] - own["begun"] - alone["lost_s"]["start"]
        lost_s = own["lost_s"]
        failures_s = sum(lost_s[cause] for cause in OF_FAILURES) - alone["lost_s"]["start"]
        measured = 1 - failures_s / lasted_s
        predicted = simulate(conditions, every, SEED, lasted_s / DAY_S)
    told = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python tests/benchmarks/goodput_against_kills.py",
        "load_average": os.getloadavg(),
        "conditions": asdict(conditions),
        "checkpoint_every": every,
        "steps": steps,
        "kills": len(job.fired),
        "lasted_s": round(lasted_s, 1),
        "measured": round(measured, 4),
        "lost_s": {cause: round(lost, 2) for cause, lost in own["lost_s"].items()},
        "predicted": {cause: round(share, 4) for cause, share in asdict(predicted).items()},
        "error": round(predicted.training - measured, 4),
        "within": WITHIN,
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
