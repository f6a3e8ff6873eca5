"""What the tree of hosts takes: to make it, a vote of all ranks, and what torch's store answers.

    python tests/benchmarks/hosts.py [--ranks 8 16 32] [--votes 50] [--json results.json]

Forked processes on loopback, many on each core: seconds are upper bounds; of votes the shortest, on rank 0. What is
predicted of 6,144 ranks is priced with these numbers (perf_model/prices/startup.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.testing._internal.distributed import fake_pg as fake_pg  # registers the backend

from cinemesh.launch.cluster.processes import forked
from cinemesh.parallel.ir.communicators import host_groups
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.comm import barrier, sum_over_ranks
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.startup import hosts_start

LOOPBACK = "127.0.0.1"
REQUESTS = 2000


def of_rank(port: int, votes: int) -> dict[str, float]:
    """Seconds of one rank of a job that meets at a store on ``port``."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    dist.barrier()  # none connects any more
    dist.destroy_process_group()
    store = TCPStore(LOOPBACK, port, ranks, is_master=False)
    begun = time.perf_counter()
    for request in range(REQUESTS // ranks):
        store.add(f"{rank}/{request}", 1)
    asked_s = time.perf_counter() - begun
    dist.init_process_group("fake", store=store, rank=rank, world_size=ranks)
    begun = time.perf_counter()
    barrier()  # makes the tree
    made_s = time.perf_counter() - begun
    vote, seconds = torch.zeros(4, dtype=torch.int64), list[float]()
    for _ in range(votes):
        begun = time.perf_counter()
        sum_over_ranks(vote)
        seconds.append(time.perf_counter() - begun)
    barrier()
    return {"made_s": made_s, "vote_s": min(seconds), "asked_s": asked_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 5, 8, 16, 32])
    parser.add_argument("--votes", type=int, default=50)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    for ranks in asked.ranks:
        server = TCPStore(LOOPBACK, 0, ranks, is_master=True, wait_for_workers=False)
        answers = forked(ranks, partial(of_rank, server.port, asked.votes))
        hops, rank = 0, ranks - 1
        while rank:
            rank, hops = min(group[0] for group in host_groups(ranks, rank)), hops + 1
        rate = REQUESTS // ranks * ranks / max(answer["asked_s"] for answer in answers)
        rows.append({"ranks": ranks, "hops": hops, "made_s": answers[0]["made_s"], "vote_s": answers[0]["vote_s"],
                     "store_requests_per_s": rate})  # fmt: skip
        print(rows[-1], flush=True)
    priced = hosts_start(Plan(tp=4, cp=2, dp_shard=768), load("grand-teton-h100"))
    assert priced is not None
    print(priced.told())
    if asked.json:
        told = {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
            "torch": torch.__version__,
            "measured": rows,
            "predicted_6144": asdict(priced),
        }
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
