"""Start-up: what the communicators of a rank take before the first step, in memory and time (torch-free).

Making one over n ranks takes ``init_base_s + n * init_rank_s``: NCCL loads kernels, allocates and looks at the machine,
then all ranks report to a root one after the other and exchange addresses along a ring of TCP connections, in steps
whose number grows with the ranks (src/bootstrap.cc, src/init.cc). Torch makes a communicator at the first collective of
its group, from one host thread: their times add up.

PREDICTED: the slope is one published start-up time of a whole job over its ranks, as if a single communicator had taken
all of it, so it errs on the long side; what is published of other systems stands beside it in the cluster file.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...parallel.ir.communicators import held
from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster


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
    """Every communicator that a rank holds, the job's own with them."""
    each = int(cluster.memory.communicator_bytes)
    return [
        StartUp(one.name, one.ranks, one.ctas, one.high_priority, each, init_s(cluster, one.ranks))
        for one in held(plan)
    ]
