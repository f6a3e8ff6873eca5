"""The whole step of the 30B model is built on a laptop: no torch, little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "build_30b.py"


def test_the_30b_step_is_built_without_torch_in_200_mb() -> None:
    """In a process of its own: this one has loaded torch long ago. The time is the benchmark's, not asserted."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert not found["torch_loaded"]
    assert found["peak_rss_bytes"] < 200e6
    assert found["records"] > 48 * 90  # forward, backward and what is made again of 48 blocks
