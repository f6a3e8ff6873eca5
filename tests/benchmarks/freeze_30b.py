"""Seconds from nothing to the bound 48-layer step of movie-gen-30b, on one core.

    python tests/benchmarks/freeze_30b.py [--plan tp=4,cp=2,dp_shard=768] [--times 7] [--json results.json]

Build, recompute, schedule, place and bind, as a rank does before its first step (``Blueprint.build`` and the executor),
but for allocating: tensors are bound on torch's meta device, which has shapes, strides and offsets and no memory.
Processor seconds; of several passes over a plan, the median of each part. The targets are 0.65 s for the sum of a plan
without overlap, and an arena at most 2 % above what is live at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from cinemesh.kernels.reference import REFERENCE
from cinemesh.memory import uncollected
from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import Space
from cinemesh.parallel.passes.arena import place_all
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.runtime.alone import Alone
from cinemesh.parallel.runtime.executor import Executor
from cinemesh.parallel.runtime.mesh import coordinates

NAME = "movie-gen-30b"


@uncollected()
def measure(text: str) -> dict[str, float | str]:
    """One pass over a plan."""
    plan = Plan.parse(text)
    times_s = [time.process_time()]
    built = build_step(preset(NAME), plan, BatchShape(1, USUAL_LATENTS[NAME]))
    times_s.append(time.process_time())
    program = prepare(built, backend="nccl")
    times_s.append(time.process_time())
    arenas = place_all(program)
    times_s.append(time.process_time())
    Executor(program, coordinates(plan, 0), Alone(plan), "meta", dict(REFERENCE), placement=arenas)
    times_s.append(time.process_time())
    build_s, passes_s, place_s, bind_s = (b - a for a, b in pairwise(times_s))
    arena = arenas[Space.DEVICE]
    return {
        "plan": text, "records": len(program.ops), "build_s": build_s, "passes_s": passes_s, "place_s": place_s,
        "bind_s": bind_s, "sum_s": times_s[-1] - times_s[0], "arena_gb": arena.total_bytes / 1e9,
        "above_bound": arena.total_bytes / arena.bound_bytes - 1,
    }  # fmt: skip


def medians(text: str, times: int) -> dict[str, float | str]:
    """Of so many passes, each part's."""
    passes = [measure(text) for _ in range(times)]
    seconds = {name: median(float(one[name]) for one in passes) for name in passes[0] if name.endswith("_s")}
    return passes[0] | {name: round(value, 3) for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--plan", nargs="+", default=["tp=4,cp=2,dp_shard=768", "tp=4,cp=2,dp_shard=768,recompute=full"]
    )
    parser.add_argument("--times", type=int, default=7, help="passes over each plan")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [medians(text, arguments.times) for text in arguments.plan]
    for row in rows:
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        facts = {"date": str(date.today()), "machine": machine, "torch": torch.__version__, "passes": arguments.times}
        facts["rows"] = rows
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
