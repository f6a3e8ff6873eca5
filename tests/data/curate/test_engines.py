"""A run is one whoever computes it, and whatever stops it: a cut of tests/benchmarks/curated.py."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from planted_clips import curate

KILLS = 3


def digests(out: Path) -> dict[str, str]:
    """Of every table below a folder."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.parquet"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "engine"), [(2, "processes")])
def test_all_engines_write_the_same(
    workers: int, engine: str, planted: tuple[Path, Any], curated: tuple[Path, Any], tmp_path: Path
) -> None:
    """Tables and every file of measures, byte for byte."""
    curate({"sources": [str(planted[0])]}, tmp_path / "out", workers, engine)
    wanted = digests(curated[0])
    assert digests(tmp_path / "out") == wanted and len(wanted) > 15


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(planted: tuple[Path, Any], curated: tuple[Path, Any], tmp_path: Path) -> None:
    """SIGKILL at random moments, again and again in one folder; then it is let be."""
    (tmp_path / "c.yaml").write_text(f"preset: small\nsources: [{planted[0]}]\n")
    where = [str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"), "--workers", "1", "--json"]
    command = [sys.executable, "-m", "cinemesh.launch", "curate", *where]
    drawn, killed = random.Random(7), 0
    for _ in range(KILLS):
        wanted = len(digests(tmp_path / "out")) + drawn.randint(0, 2)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(digests(tmp_path / "out")) < wanted:
            time.sleep(0.02)
        time.sleep(drawn.uniform(0, 1.0))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert killed >= 2
    assert digests(tmp_path / "out") == digests(curated[0])
