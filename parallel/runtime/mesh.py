"""The mesh: this rank's coordinates and its process groups, from a plan.

Every group names its backend: torch would make a gloo full mesh beside each on NCCL. That over all ranks is the job's.

On NCCL every group gets its stream's priority and, where the plan says so, its thread blocks. Without a priority a
collective waits until the blocks of the compute that was launched before have found their SMs, so all have it unless
the plan says otherwise. Gloo has neither: rank 0 says what is without effect there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..ir.communicators import Held, communicator_name, communicators, held
from ..ir.fields import AXES
from ..ir.layout import WORLD, Axes
from ..ir.plan import Plan


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


def backend_of(device: str) -> Literal["gloo", "nccl"]:
    """What carries the collectives of steps on a device."""
    return "gloo" if device == "cpu" else "nccl"


def options(one: Held, timeout: timedelta, make: Callable[[], Any]) -> Any:
    """What an NCCL communicator is made with. ``make`` gives NCCL's defaults: ``dist.ProcessGroupNCCL.Options``.

    NCCL takes the least and the most thread blocks (``min_ctas``, ``max_ctas``); one value for both is exact.
    """
    made = make()
    made.is_high_priority_stream = one.high_priority
    made._timeout = timeout  # torch warns where it differs from the group's
    if one.ctas:
        made.config.min_ctas = made.config.max_ctas = one.ctas
    return made


def start_job(plan: Plan, device: str, store: dist.Store, rank: int, timeout_s: float) -> None:  # pyright: ignore[reportPrivateImportUsage]
    """Make the job's process group, the plan's communicator over all ranks, which meet at ``store``."""
    timeout, backend = timedelta(seconds=timeout_s), backend_of(device)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=plan.world_size,
        timeout=timeout,
        pg_options=options(held(plan, WORLD), timeout, dist.ProcessGroupNCCL.Options) if backend == "nccl" else None,
    )


class Mesh:
    """Raises CinemeshError when the job's world size is not the plan's, or its GPUs have too few SMs for it."""

    def __init__(self, plan: Plan, timeout_s: float = 1800.0) -> None:
        plan.check_world_size(dist.get_world_size())
        job = dist.group.WORLD
        assert isinstance(job, dist.ProcessGroup)
        job._set_group_desc(held(plan, WORLD).name)
        self.plan = plan
        self.rank = dist.get_rank()
        self.coordinates = coordinates(plan, self.rank)
        self.before_close: list[Callable[[], None]] = []  # what holds work of the groups: CUDA graphs
        self._groups: dict[str, dist.ProcessGroup] = {}  # by the communicator's name, which each carries itself
        timeout, backend = timedelta(seconds=timeout_s), dist.get_backend(job)
        nccl = backend == "nccl"
        if nccl:
            device = torch.cuda.get_device_properties(torch.cuda.current_device())
            plan.check_device(device.name, device.multi_processor_count)
        elif self.rank == 0 and plan.streams:
            said = ", ".join(plan.streams)
            print(f"plan: {said}: without effect on gloo, which has no thread blocks, SMs or streams", file=sys.stderr)
        for one in communicators(plan):
            if one.axes == WORLD:
                self._groups[one.name] = job
                continue
            group = dist.new_group(
                group_ranks(plan, one.axes, self.rank),
                backend=backend,
                timeout=timeout,
                pg_options=options(one, timeout, dist.ProcessGroupNCCL.Options) if nccl else None,
                use_local_synchronization=True,
                group_desc=one.name,
            )
            assert isinstance(group, dist.ProcessGroup)
            self._groups[one.name] = group

    def group(self, axes: Axes, kind: str) -> dist.ProcessGroup:
        """The process group of a collective. Its ``group_desc`` is the communicator's name."""
        return self._groups[communicator_name(axes, kind)]

    @property
    def data_rank(self) -> int:
        """Which slice of the batch this rank holds: dp_replicate outer, dp_shard inner."""
        return self.coordinates["dp_replicate"] * self.plan.dp_shard + self.coordinates["dp_shard"]

    def close(self) -> None:
        """Give back what holds work of the groups. They end with the job.

        Torch names a group by its ranks and by how many groups there are: one made after another of its ranks was
        destroyed would have its name, and meet the addresses that it left in the store.
        """
        for close in self.before_close:
            close()
        self.before_close.clear()
        self._groups.clear()
