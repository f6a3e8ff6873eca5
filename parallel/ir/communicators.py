"""The communicators that a rank holds, and which of them a collective runs on (torch-free).

One communicator runs its collectives one after the other. Gathers and reductions of units have one each, so that
neither waits behind the other. Each takes memory on every rank, and time to connect when a job starts
(``perf_model/prices/startup.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .collectives import FUSED
from .layout import FSDP, REPLICATED_AXES, WORLD, Axes
from .plan import Plan
from .records import Op, lane_name

# Every group of axes over which a program communicates, and the only kind that runs there ("": any).
GROUPS: tuple[tuple[Axes, str], ...] = (
    (("tp",), ""),
    (("cp",), ""),
    (FSDP, "all_gather"),
    (FSDP, "reduce_scatter"),
    (REPLICATED_AXES, ""),
    (("dp_replicate",), ""),
    (WORLD, ""),  # the process group that a job is started with
)
_DIVIDED = {axes for axes, kind in GROUPS if kind}
BRANCHES = 4  # of a rank in the tree of hosts: few connections, and 6,144 ranks are 7 hops deep


@dataclass(frozen=True)
class Held:
    """One communicator: its name, axes and the ranks in it. ``ctas``, ``high_priority``: as ``Plan`` sets them."""

    name: str
    axes: Axes
    ranks: int
    ctas: int = 0
    high_priority: bool = True


@cache
def communicator_name(axes: Axes, kind: str) -> str:
    """The name of the communicator on which a collective of a kind over ``axes`` runs."""
    return f"{lane_name(axes)}:{kind}" if axes in _DIVIDED else lane_name(axes)


def communicator(op: Op) -> str:
    """What runs a record one after the other: a collective's communicator, by name, or a copy's way of the link."""
    return op.lane if op.to is not None else communicator_name(op.axes, FUSED.get(op.kind, op.kind))


def held(plan: Plan, axes: Axes, kind: str = "") -> Held:
    """The communicator on which a plan's collectives of a kind over ``axes`` run."""
    return Held(communicator_name(axes, kind), axes, plan.size(axes), plan.ctas(axes), plan.high_priority(axes))


def communicators(plan: Plan) -> list[Held]:
    """All that a rank of a job holds, which is what its steps communicate over; groups of one rank need none."""
    return [held(plan, axes, kind) for axes, kind in GROUPS if plan.size(axes) > 1]


def host_groups(ranks: int, rank: int) -> tuple[list[int], list[int]]:
    """The groups of a rank in the tree over which hosts agree: with those below it and with that above it.

    A rank stands for itself and a run of ranks behind it, in up to ``BRANCHES`` parts; the firsts of these are below.
    The group of an even level comes before that of an odd one: all can be made in two rounds. A rank that has none
    of either is alone in one.
    """
    groups, first, end = ([rank], [rank]), 0, ranks
    level = 0
    while end - first > 1:
        behind, parts = end - first - 1, min(BRANCHES, end - first - 1)
        starts = [first + 1 + behind * part // parts for part in range(parts)]
        if rank in (first, *starts):
            groups[level % 2][:] = first, *starts
        if rank == first:
            break
        first, end = max(s for s in starts if s <= rank), min((s for s in starts if s > rank), default=end)
        level += 1
    return groups
