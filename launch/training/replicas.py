"""Replicas of a shard compared: ranks along dp_replicate hold the same states bit by bit, or a device has erred."""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CinemeshError
from ...model.runner import StepRunner
from ...parallel.ir.fields import AXES
from ...parallel.runtime.comm import first_of, gather_at_first
from .checkpoint.digests import BITS
from .checkpoint.manifest import SAVED_STATES

PART_ELEMENTS = 1 << 22  # summed at once: torch's sum in a wider type makes a copy in that, of 32 MiB then


@dataclass(frozen=True)
class ReplicaSums:
    """What a rank holds: of the shard at these coordinates, the sum of the bits of each state."""

    shard: tuple[int, ...]
    sums: tuple[int, ...]
    where: str


def bit_sum(values: Tensor) -> int:
    """Of the items' bits as integers, modulo 2**64: one that is flipped changes it."""
    bits = values.view(-1).view(BITS[values.element_size()])
    return int(torch.stack([part.sum(dtype=torch.int64) for part in bits.split(PART_ELEMENTS)]).sum())


def compare_replicas(runner: StepRunner, since: int) -> None:
    """Raise CinemeshError, on every rank, where replicas differ. Collective.

    ``since``: the step in which they were last the same.
    """
    mesh = runner.mesh
    if mesh is None or runner.plan.dp_replicate == 1:
        return
    shard = tuple(runner.coordinates[axis] for axis in AXES if axis != "dp_replicate")
    where = f"rank {mesh.rank} ({runner.executor.device} of {socket.gethostname()})"
    sums = tuple(bit_sum(runner.buffers[state]) for state in SAVED_STATES)
    held: Any = gather_at_first(ReplicaSums(shard, sums, where))
    if (found := first_of(odd_ones(held) if held is not None else None)) is not None:
        raise CinemeshError(
            f"step {runner.steps_done}: replicas of a shard differ, which were the same in step {since}: {found}",
            remedy=f"take that device out of the job, and go on from a checkpoint of step {since} or before",
        )


def odd_ones(held: Sequence[ReplicaSums]) -> str | None:
    """Who differs from most of the replicas of its shard; all of them, where there is no most."""
    by_shard: dict[tuple[int, ...], list[ReplicaSums]] = defaultdict(list)
    for one in held:
        by_shard[one.shard].append(one)
    told: list[str] = []
    for replicas in by_shard.values():
        (usual, count), *others = Counter(one.sums for one in replicas).most_common()
        if not others:
            continue
        odd = [one for one in replicas if one.sums != usual] if count > others[0][1] else replicas
        first = next(one for one in replicas if one.sums != replicas[0].sums)
        states = [s for s, a, b in zip(SAVED_STATES, first.sums, replicas[0].sums, strict=True) if a != b]
        whom = (" or " if odd is replicas else " and ").join(one.where for one in odd)
        told.append(f"{whom} in {', '.join(states)}")
    return "; ".join(told) or None
