"""A cache built by four processes, killed at random moments: units lost, and whether the version is the same.

python tests/benchmarks/killed_builds.py --moments 20 --json tests/benchmarks/results/killed_builds.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from killed_builds import RANKS, killed_at, many_clips, start, whole_units
from latent_caches import data_of

SEED = 0  # of the moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = many_clips(folder, data_of(folder), given.clips)
        begun = time.monotonic()

        codes = [os.waitpid(child, 0)[1] for child in start(settings, folder / "whole")]
        whole_s = time.monotonic() - begun
        assert not any(codes), codes
        draws = random.Random(SEED)
        found = []
        for number in range(given.moments):
            root = folder / f"cache{number}"
            found.append(killed_at(settings, root, draws.uniform(0, whole_s)))
            print(found[-1], flush=True)
            shutil.rmtree(root)
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
            "ranks": RANKS,
            "units": len(whole_units(folder / "whole")),
            "whole_s": whole_s,
            "versions": len({left.version for left in found}),
            "most_lost": max(left.lost for left in found),
            "all_kept": all(left.kept for left in found),
            "moments": [asdict(left) for left in found],
        }
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
