"""The one door for communication: every collective of a step is called here, and written to the ledger.

Collectives are issued asynchronously and waited for later. Gloo's own reduce-scatter costs like its all-reduce, so on
gloo it is an all-to-all into a staging buffer and a sum in rank order (deterministic).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl

from .layout import Axes
from .ledger import Entry
from .mesh import Mesh
from .program import lane_name


@dataclass(slots=True)
class Pending:
    """A collective in flight."""

    work: dist.Work
    output: Tensor
    staging: Tensor | None


LAUNCH_ORDER_NCCL = (2, 26)  # the release that brought NCCL_LAUNCH_ORDER_IMPLICIT


def orders_launches() -> bool:
    """Whether NCCL keeps the order in which the host issued collectives of several communicators.

    Where it does not, kernels of two communicators may wait for each other: there is one collective at a time.
    """
    return tuple(nccl.version()[:2]) >= LAUNCH_ORDER_NCCL


def set_up_nccl() -> None:
    """What NCCL reads from the environment when its first communicator is made: call it before."""
    if orders_launches():
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" in allocator:  # their memory cannot be registered by a capture below sm_100
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


class Communicator:
    """Collectives of one rank over the groups of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.ledger: list[Entry] = []
        self.record = False
        self._one_at_a_time = torch.cuda.is_available() and not orders_launches()
        self._last: dist.Work | None = None

    def issue(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> Pending:
        """Start one collective over ``axes``; tensors are contiguous and belong to it until :meth:`wait`."""
        group = self.mesh.group(axes, kind)
        if self.record:
            payload = max(source.numel(), output.numel()) * source.element_size()
            self.ledger.append(Entry(kind, lane_name(axes), payload))
        if self._one_at_a_time and source.is_cuda and self._last is not None:
            self._last.wait()
        if kind == "all_gather":
            work = dist.all_gather_single(output.view(-1), source.view(-1), group=group, async_op=True)
        elif kind == "reduce_scatter" and staging is not None:
            work = dist.all_to_all_single(staging.view(-1), source.view(-1), group=group, async_op=True)
        elif kind == "reduce_scatter":
            work = dist.reduce_scatter_single(output.view(-1), source.view(-1), group=group, async_op=True)
        else:
            assert kind == "all_reduce" and source.data_ptr() == output.data_ptr()
            work = dist.all_reduce(output, group=group, async_op=True)
        assert work is not None
        self._last = work if self._one_at_a_time else None
        return Pending(work, output, staging)

    def bind(
        self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """:meth:`issue` and :meth:`wait` of one collective, resolved once for all steps: replay calls the pair.

        Straight to the process group: torch's checks of arguments that never change cost as much as a small collective.
        """
        group = self.mesh.group(axes, kind)
        entry = Entry(kind, lane_name(axes), max(source.numel(), output.numel()) * source.element_size())
        flat_source, flat_output = source.view(-1), output.view(-1)
        if kind == "all_gather":
            start = partial(group._allgather_base, flat_output, flat_source)
        elif kind == "reduce_scatter" and staging is not None:
            start = partial(group.alltoall_base, staging.view(-1), flat_source, [], [])
        elif kind == "reduce_scatter":
            start = partial(group._reduce_scatter_base, flat_output, flat_source)
        else:
            assert kind == "all_reduce" and source.data_ptr() == output.data_ptr()
            start = partial(group.allreduce, [flat_output])
        parts = None if staging is None else staging.view(-1, output.numel())
        flying: list[dist.Work] = []

        def issue() -> None:
            if self.record:
                self.ledger.append(entry)
            flying.append(start())

        def wait() -> None:
            flying.pop().wait()
            if parts is not None:
                torch.sum(parts, 0, out=flat_output)

        return issue, wait

    def wait(self, pending: Pending) -> None:
        pending.work.wait()
        if pending.staging is not None:
            parts = pending.staging.view(-1, pending.output.numel())
            torch.sum(parts, 0, out=pending.output.view(-1))


def all_agree(ok: bool) -> bool:
    """Whether every rank of the job says yes. A host-side vote: never part of a step."""
    vote = torch.tensor([int(ok)])
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote.item())


def gather_objects(value: object) -> list[object]:
    """One object from every rank, on every rank. Host-side: for reports, never part of a step."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's CPU tensor, on every rank. Host-side: for reports, never part of a step."""
    total = values.clone()
    dist.all_reduce(total)
    return total
