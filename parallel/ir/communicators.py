"""The communicators that a rank holds, and which of them a collective runs on (torch-free).

One communicator runs its collectives one after the other. Gathers and reductions of units have one each, so that
neither waits behind the other. Each takes memory on every rank, and time to connect when a job starts
(``perf_model/prices/startup.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

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
    (WORLD, ""),
)
_DIVIDED = {axes for axes, kind in GROUPS if kind}
JOB = "job"  # the process group that a job is started with


@dataclass(frozen=True)
class Held:
    """One communicator: its name, axes and the ranks in it. ``ctas``, ``high_priority``: as ``Plan`` sets them."""

    name: str
    axes: Axes
    ranks: int
    ctas: int = 0
    high_priority: bool = True


def communicator_name(axes: Axes, kind: str) -> str:
    """The name of the communicator on which a collective of a kind over ``axes`` runs."""
    return f"{lane_name(axes)}:{kind}" if axes in _DIVIDED else lane_name(axes)


def communicator(op: Op) -> str:
    """What runs a record one after the other: a collective's communicator, by name, or a copy's way of the link."""
    return op.lane if op.to is not None else communicator_name(op.axes, FUSED.get(op.kind, op.kind))


def communicators(plan: Plan) -> list[Held]:
    """What a plan's steps communicate over; groups of one rank need none."""
    return [
        Held(
            communicator_name(axes, kind),
            axes,
            plan.size(axes),
            plan.ctas(axes),
            plan.high_priority(axes),
        )
        for axes, kind in GROUPS
        if plan.size(axes) > 1
    ]


def held(plan: Plan) -> list[Held]:
    """All that a rank of a job holds: those of its steps, and the job's own group, once that has communicated."""
    return [*communicators(plan), Held(JOB, WORLD, plan.world_size)] if plan.world_size > 1 else []
