"""Predicted goodput beside that of a job whose ranks are killed: ``python tests/benchmarks/goodput_against_kills.py``.

Two gloo ranks under torch's elastic agent. An undisturbed job tells what a step takes and what training waits for a
checkpoint; a job with a few kills, how long until the next step. From these alone ``perf_model/prices/goodput.py``
predicts what of a run's time is training, with a checkpoint every so many steps as it proposes, for failures that a
seed draws. Then a job is killed at those moments. Writes ``results/goodput_against_kills.json``; some 10 minutes.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
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
ALONE, LASTS_S = 600, 240.0  # steps of the undisturbed job; seconds of training of the killed one
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


def began(job: Job, faults: list[Fault]) -> list[float]:
    """When each life that was killed began to train."""
    return [job.fired[life]["at"] - faults[life].part for life in sorted(job.fired)]


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
        step_s, pause_s = alone["useful_s"] / alone["steps"], alone["lost_s"].get("checkpoint", 0.0) / (ALONE / 20)
        few = moments(SEED + 1, 5)
        job = done(run_job(top / "few", values(top, top / "few", round(120.0 / step_s), 20), few))
        starts, killed = began(job, few), [job.fired[life]["at"] for life in sorted(job.fired)]
        restarts = [after - before for before, after in zip(killed, starts[1:], strict=False)]
        conditions = Conditions(
            step_s=step_s,
            mtbf_s=MTBF_S,
            pause_s=pause_s,
            write_s=pause_s,
            notice_s=0.0,
            hang_s=0.0,
            hang_fraction=0.0,
            restart_s=statistics.mean(restarts),
            node_fraction=0.0,
            repair_s=0.0,
        )
        every = proposed_steps(conditions)
        steps, kills = round(LASTS_S / step_s), moments(SEED, MOST_KILLS)
        job = done(run_job(top / "killed", values(top, top / "killed", steps, every), kills))
        lasted_s = account(top / "killed")["until"] - began(job, kills)[0]
        measured = steps * step_s / lasted_s
        predicted = simulate(conditions, every, SEED, lasted_s / DAY_S)
        own = account(top / "killed")
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
        "measured_by_the_run_itself": round(own["useful_s"] / (own["until"] - own["begun"]), 4),
        "predicted": {cause: round(share, 4) for cause, share in asdict(predicted).items()},
        "error": round(predicted.training - measured, 4),
        "within": WITHIN,
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
