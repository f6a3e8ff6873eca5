"""A learned autoencoder that begins as the linear codec: ``python tests/benchmarks/tae_trained.py [RUN]``.

Trains configs/tae/quickstart.yaml, or takes a finished run of it, and writes its curve, its wall seconds and what
``codec eval`` measures of it and of ``dct-context`` to ``results/tae_trained.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "tae_trained.json"
RECIPE = Path(__file__).parents[2] / "configs" / "tae" / "quickstart.yaml"


def cinemesh(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "cinemesh.launch", *words], check=True, text=True, stdout=-1).stdout


def measured(codec: str) -> dict[str, Any]:
    return json.loads(cinemesh("codec", "eval", "--codec", codec, "--frechet", "--json"))


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/tae")
    if len(sys.argv) == 1:
        cinemesh("tae", "train", str(RECIPE))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    account = json.loads((run / "goodput.json").read_text(encoding="utf-8"))
    about = json.loads((run / "autoencoder" / "autoencoder.json").read_text(encoding="utf-8"))["about"]
    held = "held_out/"
    found = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()}-core x86-64, no GPU, busy; one thread",
        "versions": {"torch": version("torch")},
        "command": "python tests/benchmarks/tae_trained.py",
        "recipe": about["recipe"],
        "steps": account["steps"],
        "wall_s": account["until"] - account["begun"],
        "of_it_in_steps_s": account["useful_s"],
        "curve": [
            {name.removeprefix(held): value for name, value in row.items() if name == "step" or name.startswith(held)}
            for row in rows
            if any(name.startswith(held) for name in row)
        ],
        "begun_as": measured("dct-context"),
        "trained": measured(str(run / "autoencoder")),
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
