"""The one door for communication: every collective of a step is called here, and written to the ledger.

Collectives are issued asynchronously and waited for later. Gloo's own reduce-scatter costs like its all-reduce, so on
gloo it is an all-to-all into a staging buffer and a sum in rank order (deterministic).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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


class Communicator:
    """Collectives of one rank over the groups of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.ledger: list[Entry] = []
        self.record = False

    def issue(self, kind: str, axes: Axes, source: Tensor, output: Tensor, staging: Tensor | None) -> Pending:
        """Start one collective over ``axes``; tensors are contiguous and belong to it until :meth:`wait`."""
        group = self.mesh.group(axes, kind)
        if self.record:
            payload = max(source.numel(), output.numel()) * source.element_size()
            self.ledger.append(Entry(kind, lane_name(axes), payload))
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
        return Pending(work, output, staging)

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
