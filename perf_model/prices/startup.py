"""Start-up: what a rank's communicators and the tree of hosts take before the first step (torch-free).

Making one over n ranks takes ``init_base_s + n * init_rank_s``: NCCL loads kernels, allocates and looks at the machine,
then all ranks report to a root one after the other and exchange addresses along a ring of TCP connections, in steps
whose number grows with the ranks (src/bootstrap.cc, src/init.cc). Torch makes a communicator at the first collective of
its group, from one host thread: their times add up.

PREDICTED: the slope is one published start-up time of a whole job over its ranks, as if a single communicator had taken
all of it, so it errs on the long side; what is published of other systems stands beside it in the cluster file. The
tree's gloo groups are made in two rounds; each takes ``GROUP_S``, and what the store takes to answer all ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from ...parallel.ir.communicators import BRANCHES, communicators, host_groups
from ...parallel.ir.plan import Plan
from ...parallel.ir.sockets import Sockets, sockets
from ..clusters.cluster import Cluster

# Measured on loopback (2 x86 cores, torch 2.13.0, 2026-11-29, tests/benchmarks/results/hosts.json): a gloo group
# of few ranks, a vote up and down through one, and what torch's store answers. Gloo sets an address, and awaits and
# reads those of its group.
GROUP_S = 0.05
VOTE_S = 0.8e-3
STORE_REQUESTS_PER_S = 50e3
OWN_REQUESTS, MEMBER_REQUESTS = 1, 2


@dataclass(frozen=True)
class StartUp:
    """One communicator of a rank. ``ctas``: thread blocks of its collectives, 0 where NCCL chooses."""

    name: str
    ranks: int
    ctas: int
    high_priority: bool
    bytes: int
    seconds: float


def init_s(cluster: Cluster, ranks: int) -> float:
    """Seconds until a communicator over ``ranks`` ranks is ready; 0 without NCCL."""
    nccl = cluster.nccl
    return nccl.init_base_s + ranks * nccl.init_rank_s if nccl is not None else 0.0


def start_up(plan: Plan, cluster: Cluster) -> list[StartUp]:
    """Every communicator that a rank holds."""
    each = int(cluster.memory.communicator_bytes)
    return [
        StartUp(one.name, one.ranks, one.ctas, one.high_priority, each, init_s(cluster, one.ranks))
        for one in communicators(plan)
    ]


@dataclass(frozen=True)
class HostsStart:
    """The tree over which hosts agree (``communicators.host_groups``), and what a rank keeps open.

    ``hops``: from the lowest rank to the first. ``seconds``: to make the tree. ``vote_s``: of one vote of all ranks, as
    before every step. ``sockets``: by kind, of a rank that has as many as any.
    """

    hops: int
    seconds: float
    vote_s: float
    sockets: list[Sockets]

    def told(self) -> str:
        """The same in a line."""
        kinds: Counter[str] = Counter()
        for row in self.sockets:
            kinds[row.of] += row.count
        return (
            f"between the hosts: a tree {self.hops} hops deep, {self.seconds:.1f} s to make, "
            f"{self.vote_s:.3f} s for the vote before a step; sockets of a rank: {kinds.total()} ("
            + ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            + ")"
        )


def hosts_start(plan: Plan, cluster: Cluster) -> HostsStart | None:
    """What the tree of a job takes; None for one process."""
    ranks = plan.world_size
    if ranks == 1:
        return None
    hops, behind = 0, ranks
    while behind > 1:
        hops, behind = hops + 1, math.ceil((behind - 1) / BRANCHES)
    within = max(host_groups(ranks, 0)[0])  # the last below rank 0: the group with those below it is the largest
    asked = [OWN_REQUESTS + MEMBER_REQUESTS * len(group) for group in host_groups(ranks, within)]
    seconds = len(asked) * GROUP_S + ranks * sum(asked) / STORE_REQUESTS_PER_S
    return HostsStart(hops, seconds, hops * VOTE_S, sockets(plan, within, cluster.backend))
