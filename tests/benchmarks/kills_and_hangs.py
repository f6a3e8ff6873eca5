"""A job whose ranks are killed, or hang: ``python tests/benchmarks/kills_and_hangs.py [KILLS] [SEED]``.

Under torch's elastic agent, with two gloo ranks. First every hang of ``planted_faults.HANGS``, one a life; then so many
kills at random moments; then half as many of a job of two replicas that has copies in memory alone, half of these with
what the rank's server held. Writes ``results/kills_and_hangs.json``: what was said of each hang, and after how many
seconds; of the kills what was lost, how long a restart took, and that the run ended as one that was left alone; and how
much of a core the watchdogs take.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import timeit
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.sidecar import watched

sys.path.insert(0, str(Path(__file__).parents[1]))

from elastic_job import FIRST_S, LIMIT_S, run_job
from planted_faults import EVERY, HANGS, check_hangs, check_kills, kills, long_recipe, losses, recipe_in_memory
from training import write_clips

RESULT = Path(__file__).parent / "results" / "kills_and_hangs.json"
MACHINE = "2-core x86-64, no GPU"


def hang(folder: Path) -> dict[str, Any]:
    values = long_recipe(folder, folder / "hangs", 30) | {"sample": {"steps": 2}}
    begun = time.monotonic()
    rows = check_hangs(run_job(folder / "hangs", values, HANGS), HANGS)
    limits = {"a known turn": LIMIT_S, "the first of its kind": FIRST_S}
    return {"hangs": len(HANGS), "named": len(rows), "limit_s": limits, "rows": rows, "seconds": _since(begun)}


def kill(folder: Path, count: int, seed: int) -> dict[str, Any]:
    steps, planted = 3 * count + 20, kills(count, seed)
    whole, killed = (long_recipe(folder, folder / name, steps) for name in ("whole", "killed"))
    undisturbed = run_job(folder / "whole", whole, [])
    assert undisturbed.code == 0, undisturbed.told
    begun = time.monotonic()
    job = run_job(folder / "killed", killed, planted)
    found = check_kills(job, killed, whole)
    lost, restart_s = found["steps_lost"], sorted(found["restart_s"])
    return {
        "kills": found["fired"],
        "seed": seed,
        "steps": steps,
        "steps_between_checkpoints": EVERY,
        "where": Counter(planted[number].where for number in job.fired),
        "ranks": Counter(planted[number].rank for number in job.fired),
        "bitwise_as_undisturbed": True,
        "checkpoints_that_could_not_be_read": 0,
        "messages_of_failure": len(job.errors),
        "steps_lost": dict(sorted(Counter(lost).items())),
        "restart_s": {"median": round(statistics.median(restart_s), 1), "most": round(restart_s[-1], 1)},
        "seconds": _since(begun),
    }


def lose(folder: Path, count: int, seed: int) -> dict[str, Any]:
    steps, planted = 3 * count + 20, losses(count, seed)
    whole, lost = (recipe_in_memory(folder, folder / name, steps, folder / "memory") for name in ("alone", "lost"))
    whole["logging"]["memory_every"] = 0
    undisturbed = run_job(folder / "alone", whole, [])
    assert undisturbed.code == 0, undisturbed.told
    begun = time.monotonic()
    job = run_job(folder / "lost", lost, planted)
    found = check_kills(job, lost, whole)
    restart_s = sorted(found["restart_s"])
    return {
        "kills": found["fired"],
        "with_what_the_server_held": sum(planted[number].what == "lose" for number in job.fired),
        "seed": seed,
        "steps": steps,
        "where": Counter(planted[number].where for number in job.fired),
        "from_memory": sum("resumed from the servers' memory" in line for _, line in job.out),
        "bitwise_as_undisturbed": True,
        "steps_lost": dict(sorted(Counter(found["steps_lost"]).items())),
        "restart_s": {"median": round(statistics.median(restart_s), 1), "most": round(restart_s[-1], 1)},
        "seconds": _since(begun),
    }


def cost(folder: Path, seconds: float = 60.0) -> dict[str, Any]:
    """Of a watchdog that has nothing to tell, of the store that it asks, and of the marks that a rank makes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    found = watched(Meeting(store, "cost", 0, 1), folder)
    time.sleep(5)  # it has met the store
    before, served_s = _cpu_s(found.pid), time.process_time()
    time.sleep(seconds)
    watchdog, server = (_cpu_s(found.pid) - before) / seconds, (time.process_time() - served_s) / seconds
    marked_s = timeit.timeit(lambda: found.marks.record_done(7), number=1_000_000) / 1e6
    found.close()
    return {
        "watchdog_cores": round(watchdog, 6),
        "store_cores_for_one_watchdog": round(server, 6),
        "mark_s": round(marked_s, 9),
        "seconds": seconds,
    }


def _cpu_s(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def main(count: int = 100, seed: int = 14) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder)
        told = {
            "date": date.today().isoformat(),
            "machine": MACHINE,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": f"python tests/benchmarks/kills_and_hangs.py {count} {seed}",
            "cost": cost(folder),
            "hangs": hang(folder),
            "kills": kill(folder, count, seed),
            "kills_with_copies_in_memory": lose(folder, count // 2, seed),
        }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
