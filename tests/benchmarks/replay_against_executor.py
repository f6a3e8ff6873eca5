"""Step time of frozen replay against the plain executor at small shapes: interleaved pairs.

    python tests/benchmarks/replay_against_executor.py [--pairs 30] [--steps 10]
        [--plans one dp2 tp2 cp2] [--json results.json]

Two runners in the same processes take turns of ``--steps`` steps on the same batch, so that the machine's noise falls
on both; gloo over loopback, float32, the model of ``cinemesh verify`` (36 tokens a sample). Prints the median of the
paired ratios with the interval that holds it with 95 % confidence. Both run in an arena and give bitwise the same
numbers (tests/parallel/test_frozen.py): what differs is what a step does besides its arithmetic. ``cpu ratio`` is that
of rank 0's processor time, gloo's threads included, which other load on the machine leaves alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import start_processes

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.step_against_torch import interval

from cinemesh.launch.proof.parity import OPTIMIZER, load_batch
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.runner import StepRunner
from cinemesh.model.weights import probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.frozen import Frozen
from cinemesh.parallel.runtime.mesh import Mesh

PLANS = {"one": "tp=1", "dp2": "dp_shard=2", "tp2": "tp=2", "cp2": "cp=2"}


def work(rank: int, world_size: int, store: str, name: str, arguments: argparse.Namespace, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(store, world_size), rank=rank, world_size=world_size)
    case = small_case(Plan.parse(PLANS[name], dtype="float32"))
    mesh = Mesh(case.plan) if world_size > 1 else None
    runners: dict[str, StepRunner] = {}
    for side in ("plain", "replay"):
        runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, mesh, seed=case.seed)
        runner.initialise(probe_values(0))
        runner.capture("required" if side == "replay" else "off")
        load_batch(case, runner, 0)
        runners[side] = runner
    times: dict[str, list[float]] = {side: [] for side in runners}
    cpu: dict[str, list[float]] = {side: [] for side in runners}
    for pair in range(arguments.pairs + 2):
        for side in ("plain", "replay") if pair % 2 else ("replay", "plain"):
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(arguments.steps):
                runners[side].step(1e-4)
            cpu[side].append((time.process_time() - start_cpu) / arguments.steps)
            dist.barrier()
            if pair >= 2:
                times[side].append((time.perf_counter() - start) / arguments.steps)
    if rank == 0:
        replay = runners["replay"].replay
        assert isinstance(replay, Frozen)
        facts = {"records": len(runners["plain"].program.ops), "calls": len(replay.calls)}
        Path(results).write_text(json.dumps({"times": times, "cpu": cpu, **facts}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    rows: list[dict[str, float | str]] = []
    print(
        "".join(
            f"{head:>16}"
            for head in ("plan", "records", "calls", "plain ms", "replay ms", "ratio", "95 %", "cpu ratio")
        )
    )
    for name in arguments.plans:
        world_size = small_case(Plan.parse(PLANS[name])).plan.world_size
        with tempfile.TemporaryDirectory() as folder:
            results = os.path.join(folder, "results.json")
            given = (world_size, os.path.join(folder, "store"), name, arguments, results)
            start_processes(work, given, world_size, start_method="fork")
            measured = json.loads(Path(results).read_text())
        times = measured["times"]
        ratios = [b / a for a, b in zip(times["plain"], times["replay"], strict=True)]
        low, high = interval(ratios)
        row = {
            "plan": PLANS[name], "records": measured["records"], "calls": measured["calls"],
            "plain_s": statistics.median(times["plain"]), "replay_s": statistics.median(times["replay"]),
            "ratio": statistics.median(ratios), "low": low, "high": high, "pairs": len(ratios),
            "cpu_ratio": statistics.median(measured["cpu"]["replay"]) / statistics.median(measured["cpu"]["plain"]),
        }  # fmt: skip
        rows.append(row)
        cells = (name, row["records"], row["calls"], f"{row['plain_s'] * 1e3:.2f}", f"{row['replay_s'] * 1e3:.2f}",
                 f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}", f"{row['cpu_ratio']:.3f}")  # fmt: skip
        print("".join(f"{cell:>16}" for cell in cells), flush=True)
    if arguments.json:
        facts = {
            "date": str(date.today()),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "load_average": round(os.getloadavg()[0], 1),  # what else ran: it slows both sides
            "steps_a_turn": arguments.steps,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
