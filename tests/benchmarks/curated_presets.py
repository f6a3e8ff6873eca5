"""The paper's sets on an open film: how many clips each stage of the presets low, high and sft takes.

    python tests/benchmarks/curated_presets.py

Needs ``./run film``. The weights that these presets ask for do not ship: stages that need them are off, and copies are
found by the embedder that ships, with its own limit (``SHIPPED``). Each preset runs twice: as it is, and without what
no film of ten minutes in 1280x720 can pass (``FITTED``: longer than two minutes, narrower than 768 pixels), so that the
other stages have something to drop. Writes ``results/curated_presets.json``; some 10 minutes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cinemesh.documents import write_yaml

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "curated_presets.json"
FILM = ROOT / ".venv" / "film"
CREDIT = "Big Buck Bunny, (c) copyright 2008, Blender Foundation, www.bigbuckbunny.org, CC BY 3.0"
PRESETS = ("low", "high", "sft")
OFF: dict[str, Any] = {"scores": {"aesthetic": None, "subject": None}, "humans": None, "neighbours": None}
SHIPPED: dict[str, Any] = {
    "measure": {"copies": {"kind": "efficientnet"}, "joint": None},
    "videos": OFF | {"copies": {"embedder": "efficientnet", "cosine": 0.95, "most_bits": 6}},
    "images": OFF | {"copies": {"embedder": "efficientnet", "cosine": 0.95, "most_bits": 6}},
}
FITTED: dict[str, Any] = {"duration": None, "size": {"least_px": 720}}


def curated(top: Path, preset: str, fitted: bool) -> dict[str, Any]:
    """One run: of all stages that had any rows to look at, what they reached and dropped."""
    videos = SHIPPED["videos"] | (FITTED if fitted else {})
    values = {"preset": preset, "sources": [str(FILM)], "credits": [CREDIT], **SHIPPED, "videos": videos}
    (config := top / f"{preset}.yaml").write_text(write_yaml(values))
    out = top / f"{preset}-{fitted}"
    command = [sys.executable, "-m", "cinemesh.launch", "curate", str(config), "--out", str(out)]
    done = subprocess.run([*command, "--workers", "2", "--json"], cwd=ROOT, capture_output=True, check=True)
    told = json.loads(done.stdout)
    stages = [stage for stage in told["stages"]["video"] if stage["reached"]]
    return {
        "reading": told["reading"],
        "kept": told["kept"],
        "kept_s": round(3600 * told["kept_h"], 1),
        "stages": {
            stage["stage"]: {
                "limits": stage["limits"],
                "reached": stage["reached"],
                "dropped": stage["dropped"],
                "stays": None if stage["share"] is None else round(stage["share"], 3),
                "stays_in_the_paper": stage["paper_share"],
            }
            for stage in stages
        },
    }


def main() -> None:
    told: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {name: version(name) for name in ("av", "pyarrow", "torch")},
        "command": "python tests/benchmarks/curated_presets.py",
        "credit": CREDIT,
    }
    with tempfile.TemporaryDirectory() as name:
        for preset in PRESETS:
            for what, fitted in (("as it is", False), ("fitted to the film", True)):
                told[f"{preset}, {what}"] = found = curated(Path(name), preset, fitted)
                print(preset, what, found["kept"], {n: s["dropped"] for n, s in found["stages"].items()}, flush=True)
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
