"""From a failure to the next step, part by part: what a restart takes, in place or on a spare (torch-free).

PREDICTED for a job of the cluster's size, from what was measured of each part on one machine with 8 ranks
(``tests/benchmarks/results/start_up.json``) or is published; a part whose ``basis`` is a placeholder was not. The plan
is kept: where other ranks are left than before, the planner is asked again, half a minute of one core for the 30B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from ..clusters.schema import Operations
from .startup import STORE_REQUESTS_PER_S, hosts_start, start_up

# Of a rank, to the store of its job, until it has a mesh: to meet (hello, welcome, heard, and rank 0 asks for each of
# these), to compare recipes twice and programs once, to say which device and machine it has (meeting.py, alike.py,
# environment.py, roll_call.py).
MEETING_REQUESTS = 24
# Measured on 2 x86 cores (torch 2.13.0, 2026-11-30, tests/benchmarks/start_up.py): of one rank.
IMPORT_S = 3.0  # processor seconds of what it loads, at once and later, from files that the machine has read before
IMPORT_BYTES = 1.8e9  # of these files, with torch's libraries for a CPU
CUDA_BYTES = 3e9  # more of torch's libraries for CUDA: an order of magnitude
# Of a record of the tuned plan, by ``built``: built, arranged, ordered and placed, and sent by a process beside a
# rank; received and bound by the rank.
BUILD_S, SEND_S, RECEIVE_S, BIND_S = 57e-6, 12.4e-6, 7.2e-6, 7.5e-6
SHAPE_RECORDS = 23126  # of the 30B under the planner's tuned plan, where nobody has counted
LAUNCH_S = 20e-6  # of a record that is recorded into a graph: an order of magnitude for a launch from Python
KERNELS_S = 10.0  # kernels of a step from the cache on the node's disk: placeholder


@dataclass(frozen=True, kw_only=True)
class RestartPart:
    """One part of a restart. ``basis``: what its seconds are taken from."""

    name: str
    seconds: float
    basis: str


def built_and_bound_s(records: Sequence[int], cores: int, joining_s: float) -> tuple[float, float]:
    """Seconds that a rank of so many ``cores`` waits until its steps are built, and those in which it binds them.

    ``records``: of each shape. Shapes are dealt out to processes, the rank the last of them (launch/cluster/builders);
    the others begin ``joining_s`` before it. Shapes differ little in their records: shares are taken for even.
    """
    shapes, each = len(records), sum(records) / len(records)
    shares = max(1, min(shapes, cores))
    own, others = shapes // shares, -(-shapes // shares) if shares > 1 else 0
    built = max(own * each * BUILD_S, others * each * (BUILD_S + SEND_S) - joining_s)
    return built, each * (shapes * BIND_S + (shapes - own) * RECEIVE_S)


def restart_parts(
    plan: Plan, cluster: Cluster, operations: Operations, state_bytes: int, records: Sequence[int]
) -> list[RestartPart]:
    """In their order; ``records``: of every step that is captured, one a bucket."""
    hosts = hosts_start(plan, cluster)
    nodes = -(-plan.world_size // cluster.gpus_per_server)
    libraries = IMPORT_BYTES + (CUDA_BYTES if cluster.device == "cuda" else 0.0)
    made = sum(each.seconds for each in start_up(plan, cluster)) + (hosts.seconds if hosts is not None else 0.0)
    met = plan.world_size * MEETING_REQUESTS / STORE_REQUESTS_PER_S
    cores = cluster.host.cores if cluster.host is not None else 1
    built, bound = built_and_bound_s(records, cores, met)
    parts = [
        ("detection", operations.notice_s, "cluster file: a roll call of the watchdogs"),
        ("rendezvous", operations.restart_s, "cluster file: agents meet, processes are started"),
        ("imports", IMPORT_S, "measured, on one machine"),
        ("imports from a shared disk", libraries * nodes / operations.read_bytes_per_s, "cluster file's read rate"),
        ("ranks meet and compare", met, "measured: store requests"),
        ("communicators", made, "published start-up times of whole jobs"),
        ("steps built", built, f"measured, by records, on {cores} cores a rank; it begins before ranks meet"),
        ("steps received and bound", bound, "measured, by records"),
        ("reading the checkpoint", state_bytes / operations.read_bytes_per_s, "cluster file's read rate"),
        ("kernels", KERNELS_S if cluster.device == "cuda" else 0.0, "placeholder: from the node's cache"),
        ("capture", sum(records) * LAUNCH_S, "an order of magnitude, by records"),
    ]
    return [RestartPart(name=name, seconds=seconds, basis=basis) for name, seconds, basis in parts]
