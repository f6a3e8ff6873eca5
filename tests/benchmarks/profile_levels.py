"""What ``cinemesh profile`` accounts for of a step, and what ``calibrate --profile`` makes of the prices of new plans.

    python tests/benchmarks/profile_levels.py [--rounds 3]

The quick start's steps on two processes under one plan are profiled, and the prices of the cluster that ships for CPUs
take their levels. Then its steps under other plans are profiled beside both: with them the mean error of the records'
prices must fall. Writes ``results/profile_levels.json``; some 10 minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "profile_levels.json"
RECIPE = ROOT / "configs" / "quickstart.yaml"
FIRST, OTHERS = "dp_shard=2", ("tp=2", "cp=2", "dp_replicate=2", "dp_shard=2,recompute=full")
ACCOUNTED = 0.02  # of a step, that no lane may miss


def cinemesh(*words: object) -> str:
    """What the command prints. Raises RuntimeError with what it said of a failure."""
    command = [sys.executable, "-m", "cinemesh.launch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def profiled(folder: Path, plan: str, cluster: object, out: str) -> dict[str, Any]:
    """The reply of a profile of the quick start under a plan, beside a cluster's prices."""
    kept = ("--set", f"logging.directory={folder / 'run'}", "--set", f"data.cache={folder / 'cache'}")
    words = ("--nproc", 2, "--steps", 10, "--plan", plan, "--cluster", cluster, "--out", folder / out, "--json")
    return json.loads(cinemesh("profile", RECIPE, *words, *kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    accounted: list[float] = []
    errors: dict[str, dict[str, list[float]]] = {plan: {"before": [], "after": []} for plan in OTHERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = profiled(folder, FIRST, "local-cpu", "first")
        accounted.append(first["accounted"])
        leveled = folder / "leveled.yaml"
        cinemesh("calibrate", "--profile", folder / "first" / "profile.json", "--out", leveled)
        for _ in range(rounds):
            for plan in OTHERS:
                for when, cluster in (("before", "local-cpu"), ("after", leveled)):
                    reply = profiled(folder, plan, cluster, "other")
                    accounted.append(reply["accounted"])
                    errors[plan][when].append(reply["error"])
                    print(f"{plan} {when}: error {reply['error']:.1%}, accounted {reply['accounted']:.2%}", flush=True)
    told = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "command": f"python tests/benchmarks/profile_levels.py --rounds {rounds}",
        "load_average": os.getloadavg(),
        "leveled_by": FIRST,
        "accounted": {
            "median": statistics.median(accounted),
            "each": sorted(round(share, 4) for share in accounted),
            "within": ACCOUNTED,
        },
        "mean_error": {
            plan: {when: round(statistics.mean(of), 4) for when, of in by.items()} for plan, by in errors.items()
        },
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
