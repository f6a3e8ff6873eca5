"""The mesh: this rank's coordinates and its process groups, from a plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from .communicators import GROUPS
from .layout import Axes
from .plan import AXES, Plan


def coordinates(plan: Plan, rank: int) -> dict[str, int]:
    """Position of a rank on every axis; ``plan.order`` lists the axes innermost first."""
    position: dict[str, int] = {}
    for axis in plan.order:
        rank, position[axis] = divmod(rank, plan.size(axis))
    return position


def rank_at(plan: Plan, position: dict[str, int]) -> int:
    rank = 0
    for axis in reversed(plan.order):
        rank = rank * plan.size(axis) + position[axis]
    return rank


def group_ranks(plan: Plan, axes: Axes, rank: int) -> list[int]:
    """The ranks that differ from ``rank`` only on ``axes``, ascending: a communicator's order."""
    here = coordinates(plan, rank)
    free = [range(plan.size(axis)) if axis in axes else (here[axis],) for axis in AXES]
    return sorted(rank_at(plan, dict(zip(AXES, position, strict=True))) for position in itertools.product(*free))


class Mesh:
    """Raises CinemeshError when the job's world size is not the plan's."""

    def __init__(self, plan: Plan, timeout_s: float = 1800.0) -> None:
        plan.check_world_size(dist.get_world_size())
        self.plan = plan
        self.rank = dist.get_rank()
        self.coordinates = coordinates(plan, self.rank)
        self.before_close: list[Callable[[], None]] = []  # what holds work of the groups: CUDA graphs
        self._groups: dict[tuple[Axes, str], dist.ProcessGroup] = {}
        for axes, purpose in GROUPS:
            if plan.size(axes) > 1:
                group = dist.new_group(
                    group_ranks(plan, axes, self.rank),
                    timeout=timedelta(seconds=timeout_s),
                    use_local_synchronization=True,
                )
                assert isinstance(group, dist.ProcessGroup)
                self._groups[axes, purpose] = group

    def group(self, axes: Axes, kind: str) -> dist.ProcessGroup:
        return self._groups.get((axes, kind)) or self._groups[axes, ""]

    @property
    def data_rank(self) -> int:
        """Which slice of the batch this rank holds: dp_replicate outer, dp_shard inner."""
        return self.coordinates["dp_replicate"] * self.plan.dp_shard + self.coordinates["dp_shard"]

    def close(self) -> None:
        for close in self.before_close:
            close()
        self.before_close.clear()
        for group in self._groups.values():
            dist.destroy_process_group(group)
        self._groups.clear()
