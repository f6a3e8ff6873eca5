"""Frozen weights in shards, gathered a unit at a time into two buffers: see ``ir/frozen_layers.py``.

    wait for unit k  ->  issue the gather of unit k + 1  ->  compute with unit k

One thread issues them, on the communicator that gathers the step's own units, between two steps: on every rank all of
these gathers stand between the collectives of the same two steps. A buffer is written again by the gather that is
issued behind all compute that reads it, which on a GPU waits for that compute's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ir.frozen_layers import BUFFERS, GATHERS, FrozenLayers, sharing_ranks
from ..ir.layout import FSDP
from .comm import Communicator


class GatheredLayers:
    """The units of ``layers`` on one rank of several. ``values[k]``: where unit k lies while it is there, flat."""

    def __init__(self, layers: FrozenLayers, comm: Communicator, dtype: torch.dtype, device: str) -> None:
        ranks = sharing_ranks(comm.mesh.plan)
        assert ranks > 1, "one rank alone gathers nothing"
        options = {"dtype": dtype, "device": device}
        shares = [layers.share(unit, ranks) for unit in range(len(layers.units))]
        self.rank = comm.mesh.group(FSDP, GATHERS).rank()
        self.shards = [torch.zeros(share, **options) for share in shares]
        largest = [max((shares[unit] for unit in layers.buffer_units(of)), default=0) for of in range(BUFFERS)]
        buffers = [torch.zeros(ranks * share, **options) for share in largest]
        self.values = [buffers[unit % BUFFERS][: ranks * share] for unit, share in enumerate(shares)]
        self._gathers = [
            comm.bind(GATHERS, FSDP, shard, value, None)
            for shard, value in zip(self.shards, self.values, strict=True)
        ]  # fmt: skip

    def fill(self, unit: int, read: Callable[[int, Tensor], None]) -> None:
        """Set this rank's shard: ``read(first, target)`` writes the unit's elements from ``first`` on to a target."""
        shard = self.shards[unit]
        read(self.rank * len(shard), shard)

    def turn(self) -> Iterator[int]:
        """Every unit's number, when its values are there until the next is asked for. Collective: take them all."""
        self._gathers[0].issue()
        for unit, gather in enumerate(self._gathers):
            gather.wait()
            if unit + 1 < len(self._gathers):
                self._gathers[unit + 1].issue()
            yield unit
