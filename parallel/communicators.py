"""The communicators that a rank holds, and which of them a collective runs on (torch-free).

One communicator runs its collectives one after the other. Gathers and reductions of units have one each, so that
neither waits behind the other. Each takes memory on every rank, and time to connect when a job starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import FSDP, REPLICATED_UNIT, WORLD, Axes
from .plan import Plan
from .program import Op, lane_name

# Every group of axes over which a program communicates, and the only kind that runs there ("": any).
GROUPS: tuple[tuple[Axes, str], ...] = (
    (("tp",), ""),
    (("cp",), ""),
    (FSDP, "all_gather"),
    (FSDP, "reduce_scatter"),
    (REPLICATED_UNIT, ""),
    (("dp_replicate",), ""),
    (WORLD, ""),
)
_DIVIDED = {lane_name(axes) for axes, kind in GROUPS if kind}


@dataclass(frozen=True)
class Held:
    """One communicator: its name, axes and the ranks in it."""

    name: str
    axes: Axes
    ranks: int


def communicator(op: Op) -> str:
    """The name of the communicator that a collective runs on."""
    return f"{op.lane}:{op.kind}" if op.lane in _DIVIDED else op.lane


def communicators(plan: Plan) -> list[Held]:
    """What every rank of a plan holds for its steps; groups of one rank need none.

    The process group that a job is started with comes on top, once it has communicated.
    """
    return [
        Held(":".join(filter(None, (lane_name(axes), kind))), axes, plan.size(axes))
        for axes, kind in GROUPS
        if plan.size(axes) > 1
    ]


def communicator_bytes(plan: Plan, bytes_each: int) -> int:
    """Device memory that a rank's communicators take besides the arena, at ``bytes_each``: a measured constant."""
    return bytes_each * len(communicators(plan))
