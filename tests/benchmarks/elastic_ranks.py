"""A job that loses a node, goes on without it, and has it back: ``python tests/benchmarks/elastic_ranks.py [NODES]``.

Each node is an agent of torchrun's with two gloo ranks, on this machine. Writes ``results/elastic_ranks.json``: the
plan of each life, and how far the losses are from those of one rank that was left alone, in float64.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from elastic_nodes import lose_and_regain
from training import write_clips

RESULT = Path(__file__).parent / "results" / "elastic_ranks.json"
MACHINE = "2-core x86-64, no GPU"


def main(nodes: int = 4) -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder)
        plans, losses, alone = lose_and_regain(folder, folder / "job", nodes)
    told = {
        "date": date.today().isoformat(),
        "machine": MACHINE,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"python tests/benchmarks/elastic_ranks.py {nodes}",
        "lives": [f"{plan.partition(' on cpu; ')[0]}, {_begins(plan)}" for plan in plans],
        "steps": len(alone),
        "steps_compared": len(losses.keys() & alone.keys()),
        "most_relative_difference_of_a_loss": max(abs(losses[step] / alone[step] - 1) for step in alone),
        "seconds": round(time.monotonic() - begun, 1),
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")


def _begins(plan: str) -> str:
    return f"from step {int(plan.rpartition('step-')[2])}" if "resumed" in plan else "from step 0"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
