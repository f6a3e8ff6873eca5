"""Seconds and memory that building the 48-layer step of movie-gen-30b takes, without torch.

    python tests/benchmarks/build_30b.py [--json]

The targets are 1 s for build and rematerialize, 1.5 s to schedule the step with all its slices, and 200 MB for the
whole process. The time varies with the machine: the suite asserts the memory, and that torch stays out, alone
(tests/parallel/test_build_30b.py).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from cinemesh.model.config import USUAL_LATENTS, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.parallel.passes.recompute import rematerialize

NAME = "movie-gen-30b"
OVERLAP = {"kv_slices": 4, "tp_slices": 4, "grad_units": 2, "defer_weight_gradients": True}


def peak_rss_bytes() -> int:
    """Of this program. On Linux ru_maxrss would still count the process that started it."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def measure() -> dict[str, float | bool]:
    """One build at TP4, CP2, dp_shard 768, from a cold cache."""
    start_s = time.perf_counter()
    built = build_step(preset(NAME), Plan(tp=4, cp=2, dp_shard=768), BatchShape(1, USUAL_LATENTS[NAME]))
    built_s = time.perf_counter()
    program = rematerialize(built)
    done_s = time.perf_counter()
    plan = Plan(tp=4, cp=2, dp_shard=768, **OVERLAP)
    sliced = build_step(preset(NAME), plan, BatchShape(1, USUAL_LATENTS[NAME]))
    sliced_s = time.perf_counter()
    scheduled = prepare(sliced, backend="nccl")
    scheduled_s = time.perf_counter()
    return {
        "build_s": built_s - start_s,
        "rematerialize_s": done_s - built_s,
        "records": len(program.ops),
        "schedule_s": scheduled_s - sliced_s,
        "scheduled_records": len(scheduled.ops),
        "peak_rss_bytes": peak_rss_bytes(),
        "torch_loaded": "torch" in sys.modules,
    }


if __name__ == "__main__":
    found = measure()
    if "--json" in sys.argv:
        print(json.dumps(found))
    else:
        print(
            f"{found['records']:,} records: built in {found['build_s']:.3f} s, rematerialized in "
            f"{found['rematerialize_s']:.3f} s\n"
            f"{found['scheduled_records']:,} records of the step in slices: all passes in {found['schedule_s']:.3f} s\n"
            f"peak memory of the process {found['peak_rss_bytes'] / 1e6:.0f} MB; "
            f"torch {'LOADED' if found['torch_loaded'] else 'not loaded'}"
        )
