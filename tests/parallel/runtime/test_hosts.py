"""Hosts agree over a tree that bears any number of ranks: what they hear, and how many sockets it takes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.testing._internal.distributed import fake_pg as fake_pg  # registers the backend

from cinemesh.launch.cluster.processes import forked
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.sockets import sockets
from cinemesh.parallel.runtime import comm, mesh
from cinemesh.parallel.runtime.mesh import Mesh, start_job


def said_by_all() -> tuple[list[object], list[object] | None, str | None, list[float]]:
    rank = dist.get_rank()
    silent_below = max(0, dist.get_world_size() - 2)
    comm.barrier()
    return (
        comm.gather_objects({"rank": rank}),
        comm.gather_at_first(rank),
        comm.first_of(f"rank {rank}" if rank >= silent_below else None),
        comm.sum_over_ranks(torch.tensor([1.0, rank, 0.1])).tolist(),
    )


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_all_hear_what_all_said_in_the_order_of_ranks(ranks: int, pool: Pool) -> None:
    answers = pool.run(ranks, said_by_all)
    for rank, (everything, at_first, first, total) in enumerate(answers):
        assert everything == [{"rank": one} for one in range(ranks)]
        assert at_first == (list(range(ranks)) if rank == 0 else None)
        assert first == f"rank {max(0, ranks - 2)}"
        assert total == answers[0][3], "two ranks that differ in the last bit go different ways"
        assert total == pytest.approx([ranks, ranks * (ranks - 1) / 2, ranks * 0.1])


def counted() -> tuple[int, int]:
    """After nine calls, and inside the last."""
    counter = [0]
    comm.count_host_calls(counter)
    said_by_all()
    comm._combined(0, lambda said: counter[0])
    inside = comm._agreed(counter[0], lambda said: counter[0])
    return counter[0], inside


@pytest.mark.parametrize("ranks", [1, 5])
def test_calls_of_all_hosts_are_counted_alike(ranks: int, pool: Pool) -> None:
    """Who waits in one is told by an odd count, and who is missing by a lower one: a watchdog reads them."""
    calls = 2 + 2 + 1 + 2 + 1 + 1 + 2  # up and down are one each, but a sum's
    for count, inside in pool.run(ranks, counted):
        assert count == 2 * calls and (ranks == 1 or inside == 2 * calls - 3)


def tcp_sockets() -> int:
    """Of this process, by the kernel."""
    tables = [Path(f"/proc/self/net/{name}").read_text(encoding="ascii") for name in ("tcp", "tcp6")]
    known = {f"socket:[{row.split()[9]}]" for table in tables for row in table.splitlines()[1:]}
    links = [Path(entry) for entry in os.scandir("/proc/self/fd")]
    return sum(os.readlink(link) in known for link in links if link.is_symlink())


def opened(plan: Plan, backend: str, port: int) -> tuple[int, Counter[str]]:
    """TCP sockets that a rank has opened once its job, its mesh and a vote are made; and those expected, by kind."""
    rank = dist.get_rank()
    dist.barrier()  # none connects any more
    dist.destroy_process_group()
    before = tcp_sockets()
    store = TCPStore("127.0.0.1", port, plan.world_size, is_master=False)
    with mock.patch.object(mesh, "backend_of", lambda device: backend):
        start_job(plan, "cpu", store, rank, 60.0)
    Mesh(plan, 60.0)
    comm.barrier()
    found = tcp_sockets() - before
    comm.barrier()  # none has left
    expected: Counter[str] = Counter()
    for row in sockets(plan, rank, "gloo" if backend == "gloo" else "nccl"):
        expected[row.of] += row.count
    return found, expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads the socket table of /proc")
@pytest.mark.parametrize("backend", ["gloo", "fake"])
@pytest.mark.parametrize("text", ["tp=2,cp=2", "tp=2,cp=2,dp_shard=2", "tp=2,cp=2,dp_shard=2,dp_replicate=2"])
def test_sockets_are_those_that_the_kernel_counts(text: str, backend: str) -> None:
    """Of real ranks, a store and gloo; for NCCL's groups stand torch's fakes, which open none: what it opens beside."""
    plan = Plan.parse(text)
    server = TCPStore("127.0.0.1", 0, plan.world_size, is_master=True, wait_for_workers=False)
    for found, expected in forked(plan.world_size, partial(opened, plan, backend, server.port)):
        assert found == (expected.total() if backend == "gloo" else of_hosts(expected)), expected


def of_hosts(expected: Counter[str]) -> int:
    return expected["store"] + expected["hosts"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the socket table of /proc")
def test_a_gloo_mesh_beside_every_group_is_found() -> None:
    """As torch makes them where a job has a backend for the CPU beside NCCL, and groups name none."""
    plan = Plan.parse("tp=2,cp=2")
    server = TCPStore("127.0.0.1", 0, plan.world_size, is_master=True, wait_for_workers=False)
    ranks = forked(plan.world_size, partial(opened, plan, "cpu:gloo,cuda:fake", server.port))
    assert all(found > of_hosts(expected) for found, expected in ranks)
