"""What telemetry costs of a step: ``python tests/benchmarks/telemetry_cost.py``.

The quick start's steps run on one process, replayed; then all that telemetry does for as many steps and reports is done
alone, with TensorBoard's own thread. CPU seconds of the second, of all threads, over wall seconds of the first. Writes
``results/telemetry_cost.json``.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from cinemesh.launch.models import read_model
from cinemesh.launch.plans import read_plan
from cinemesh.launch.proof.parity import Case
from cinemesh.launch.proof.traced import traced
from cinemesh.launch.training.predicted import Predicted
from cinemesh.launch.training.recipe import read_config
from cinemesh.launch.training.reports import Done, Reports, StepOf
from cinemesh.launch.training.telemetry import Telemetry

RESULT = Path(__file__).parent / "results" / "telemetry_cost.json"
RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS = 2000
LIMIT = 0.005  # of step seconds


def main() -> None:
    named = read_model("tiny-video")
    case = Case(read_plan("tp=1", dtype="float32"), named.config, 8, named.latent(), 10)
    step_s = statistics.median(traced(case)[0].plain_s)
    config = read_config(RECIPE, ["plan.dp_shard=1"])
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(Path(folder), STEPS, 0)
        predicted = Predicted(config.plan, "c", "cpu", {}, 10**9, 1e11)
        reports = Reports([StepOf("2x16x16", 1, 1024, 10**11, step_s)], predicted, config, "cpu", 0, telemetry)
        begun, own = time.process_time(), telemetry.cpu_s
        for step in range(1, STEPS + 1):
            reports.add(Done(0, 1e-3, step_s * (1 + step % 7 / 100), 1.0 / step, 2.0, 0.001))
            telemetry.advance()
            if step % config.logging.every == 0:
                reports.report(step)
        telemetry.close()
        cpu_s, own = time.process_time() - begun, telemetry.cpu_s - own
    told = {
        "date": str(date.today()),
        "machine": "2-core x86-64, no GPU",
        "versions": {name: version(name) for name in ("torch", "tensorboard")},
        "command": "python tests/benchmarks/telemetry_cost.py",
        "load_average": os.getloadavg(),
        "steps": STEPS,
        "report_every": config.logging.every,
        "step_s": round(step_s, 4),
        "cpu_s_per_step": round(cpu_s / STEPS, 7),
        "of_it_in_the_thread_of_the_steps": round(own / STEPS, 7),
        "share_of_step_seconds": round(cpu_s / STEPS / step_s, 6),
        "limit": LIMIT,
        "least_step_s_within_it": round(cpu_s / STEPS / LIMIT, 4),
    }
    print(told)
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
