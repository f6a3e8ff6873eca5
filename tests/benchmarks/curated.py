"""Curation of ten minutes of film; and whether it ends alike, whoever computes and whatever stops it.

    python tests/benchmarks/curated.py [--kills 20]

First the funnel of ``configs/curation/film.yaml`` from nothing on two processes, once more with another limit, which
must decode nothing. Then the planted clips of the tests: by 1, 2 and 4 processes and by Ray, and killed at random
moments again and again in one folder: every table and file of measures is compared byte for byte. Needs
``./run film`` and the extra ``ray``. Writes ``results/curated.json``; some 15 minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from planted_clips import write_planted

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "curated.json"
ENGINES = ((1, "processes"), (2, "processes"), (4, "processes"), (2, "ray"))
BIKES = [30, 76, 137, 187, 242]  # frames where its shots begin, by hand


def command(config: Path, out: Path, workers: int, engine: str, *more: str) -> list[str]:
    where = ["--out", str(out), "--workers", str(workers), "--engine", engine, "--json"]
    return [sys.executable, "-m", "cinemesh.launch", "curate", str(config), *where, *more]


def digests(out: Path) -> dict[str, str]:
    """Of every table below a folder."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.parquet"))
    }


def film(out: Path) -> dict[str, Any]:
    """The funnel from nothing, and again with another limit."""
    config, found = ROOT / "configs" / "curation" / "film.yaml", dict[str, Any]()
    for what, more in (("from_nothing", ()), ("another_limit", ("--set", "videos.text.below=0.4"))):
        begun = time.monotonic()
        before = {name: told for name, told in digests(out).items() if name.startswith("measured")}
        done = subprocess.run(command(config, out, 2, "processes", *more), cwd=ROOT, capture_output=True, check=True)
        after = {name: told for name, told in digests(out).items() if name.startswith("measured")}
        found[what] = {
            "seconds": round(time.monotonic() - begun, 1),
            "files_of_measures_made": len(after.keys() - before.keys()),
            "told": json.loads(done.stdout),
        }
    rows = pq.read_table(out / "clips.parquet").to_pylist()
    begins = [round(row["first_s"] * 25) for row in rows if str(row["file"]).endswith("bikes.mp4")]
    found["bikes_cut_exactly"] = sorted({*begins} - {0}) == BIKES
    found["clips"] = len(rows)
    return found


def killed(config: Path, out: Path, kills: int) -> int:
    """SIGKILL at random moments in one folder, then the run is let be; how many met it at work."""
    drawn, met = random.Random(7), 0
    for number in range(kills):
        wanted = len(digests(out)) + drawn.randint(0, 2)
        process = subprocess.Popen(
            command(config, out, 1, "processes"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(digests(out)) < wanted:
            time.sleep(0.02)
        time.sleep(drawn.uniform(0, 1.0))
        met += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {number + 1} of {kills}: {len(digests(out))} files of measures", flush=True)
    subprocess.run(command(config, out, 1, "processes"), stdout=subprocess.DEVNULL, check=True)
    return met


def main(kills: int) -> None:
    told: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "versions": {name: version(name) for name in ("av", "pyarrow", "ray", "torch")},
        "command": "python tests/benchmarks/curated.py",
        "load_average": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        told["film"] = film(top / "film")
        print(json.dumps(told["film"], indent=1), flush=True)
        write_planted(top / "clips")
        (config := top / "planted.yaml").write_text(f"preset: small\nsources: [{top / 'clips'}]\n")
        wanted: dict[str, str] = {}
        for workers, engine in ENGINES:
            begun = time.monotonic()
            out = top / f"{engine}-{workers}"
            subprocess.run(command(config, out, workers, engine), stdout=subprocess.DEVNULL, check=True)
            wanted = wanted or digests(out)
            same, seconds = digests(out) == wanted, round(time.monotonic() - begun, 1)
            told[f"{workers} {engine}"] = {"same_bytes": same, "files": len(wanted), "seconds": seconds}
            print(workers, engine, told[f"{workers} {engine}"], flush=True)
        met = killed(config, top / "killed", kills)
        told["kills"] = {"sent": kills, "met_at_work": met, "same_bytes": digests(top / "killed") == wanted}
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told["kills"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    main(parser.parse_args().kills)
