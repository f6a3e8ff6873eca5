"""The sockets that a rank keeps open while it trains: of the store, of gloo and of NCCL (torch-free).

What NCCL opens is read in its source (v2.29.7): ``src/bootstrap.cc``, ``src/proxy.cc``, ``src/ras``. Not counted are
those of its network plugin, a pair for each channel to each neighbour on another server: over InfiniBand or RoCE they
carry the handshake of queue pairs, with the socket plugin the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .communicators import communicators, host_groups
from .plan import Plan

# Of one communicator: two listeners (ring, messages), a connection to each neighbour on the ring, the listener of the
# proxy, and both ends of the rank's connection to its own proxy.
COMMUNICATOR_SOCKETS = 7
RAS_SOCKETS = 4  # of a process: two listeners, and a connection to each neighbour among all processes


@dataclass(frozen=True)
class Sockets:
    """TCP sockets of one kind, listeners with them."""

    of: str
    count: int


def sockets(plan: Plan, rank: int, backend: Literal["gloo", "nccl"]) -> list[Sockets]:
    """All of a rank, without those of the store's server beside rank 0: one for each rank, one for each watchdog.

    A gloo group is a full mesh: a listener, and a connection to every other rank of it.
    """
    if plan.world_size == 1:
        return []
    rows = [Sockets("store", 1)]
    rows += [Sockets("hosts", len(group)) for group in host_groups(plan.world_size, rank)]
    if backend == "gloo":
        return rows + [Sockets(held.name, held.ranks) for held in communicators(plan)]
    rows += [Sockets(held.name, COMMUNICATOR_SOCKETS) for held in communicators(plan)]
    return [*rows, Sockets("RAS", RAS_SOCKETS)]
