"""Tiles over ranks: tile i is worked on by rank i mod R, and all ranks have all of them, in order.

Whole tiles, no rows: no halo, any shape, and the bits of one process, since a tile is the same work wherever it is
done (on CPUs: with as many threads). R tiles are in memory at once, whatever the length of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from ...parallel.ir.layout import WORLD
from ...parallel.runtime.comm import Communicator

T = TypeVar("T")


def each_tile(
    tiles: Sequence[T], work: Callable[[T], Tensor], rows: Callable[[T], int], communicator: Communicator | None
) -> Iterator[Tensor]:
    """``work`` of every tile, [rows of the tile, ...], in order. Collective where there is a communicator.

    All results have one dtype and, but for their rows, one shape; they lie on the device of the communicator's mesh.
    """
    if communicator is None:
        yield from map(work, tiles)
        return
    rank, ranks = communicator.mesh.rank, communicator.mesh.plan.world_size
    most = max(map(rows, tiles))
    like: Tensor | None = None
    for first in range(0, len(tiles), ranks):
        here = tiles[first : first + ranks]
        mine = work(here[rank]) if rank < len(here) else None
        if mine is None and like is None:  # fewer tiles than ranks: the shape is that of any
            mine, like = None, work(here[0])
        like = mine if mine is not None else like
        assert like is not None
        source = like.new_zeros(most, *like.shape[1:])
        if mine is not None:
            source[: len(mine)] = mine
        gathered = like.new_empty(ranks * most, *like.shape[1:])
        collective = communicator.bind("all_gather", WORLD, source.contiguous(), gathered, None)
        collective.issue()
        collective.wait()
        for tile, part in zip(here, gathered.view(ranks, most, *like.shape[1:]), strict=False):
            yield part[: rows(tile)].clone()
