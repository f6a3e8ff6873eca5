"""The placement pass: every temporary buffer gets an offset in one arena (torch-free).

Two storages that live at the same time never share a byte. A step's records and lifetimes are known before it runs, so
this is packing of intervals: each storage is put into the smallest hole among those that live with it (best fit), the
storages taken in one of a few orders; the best order wins. Kept activations are freed in the reverse order of their
making, nearly a stack, which the longest-lived-first order finds. The program is identical on all ranks, and so are
the offsets.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..ir.program import Program
from ..ir.records import Space
from .liveness import Lifetimes, lifetimes

ALIGN_BYTES = 256  # what wide loads and NCCL want; design of the units too
GOOD_ENOUGH = 1.005  # of the bound: no further order is tried
OUTLIVES = 40  # records: about a block's forward, or half its backward; what lives longer is placed first
WINDOW = 128  # records: an interval is compared with what lives near it

Interval = tuple[int, int, int]  # first and last record, bytes
Placed = tuple[int, int, int, int]  # start and stop in the arena, first and last record

# Which storage is placed next: long-lived ones first keep the stack whole, large ones first leave holes for the small.
ORDERS: tuple[Callable[[Interval], tuple[int, ...]], ...] = (
    lambda x: (x[0] - x[1], -x[2]),
    lambda x: ((x[0] - x[1] - 1) * x[2], x[0]),
    lambda x: (-x[2], x[0]),
    lambda x: (x[0] - x[1] > -OUTLIVES, (x[0] - x[1] - 1) * x[2]),
    lambda x: (x[0] - x[1] > -OUTLIVES, x[0]),
)


@dataclass(frozen=True)
class Arena:
    """``offsets`` in bytes, of every temporary storage; ``bound_bytes``: the most that is live at once."""

    offsets: dict[str, int]
    total_bytes: int
    bound_bytes: int


def place(program: Program, lives: Lifetimes | None = None) -> Arena:
    """Offsets for all temporaries of a program's space: at no record do two that live overlap."""
    lives = lives or lifetimes(program, workspace=lambda _, op: 0)
    names, intervals = storages(program, lives)
    offsets, total = pack(intervals)
    return Arena(dict(zip(names, offsets, strict=True)), total, lives.peak_bytes - lives.persistent_bytes)


def place_all(program: Program) -> dict[Space, Arena]:
    """Offsets for the temporaries of every space."""
    return {Space.DEVICE: place(program), Space.HOST: place(program, lifetimes(program, Space.HOST))}


def storages(program: Program, lives: Lifetimes) -> tuple[list[str], list[Interval]]:
    """Temporary storages in the order of their first use, and when they live."""
    last = {root: i for i, roots in enumerate(lives.free) for root in roots}
    names = [root for roots in lives.allocate for root in roots]
    first = {root: i for i, roots in enumerate(lives.allocate) for root in roots}
    return names, [(first[name], last[name], program.bytes(name)) for name in names]


def pack(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """An offset for every interval, ALIGN_BYTES aligned, and the bytes that they span; the best of ``ORDERS``."""
    aligned = [(first, last, -(-size // ALIGN_BYTES) * ALIGN_BYTES) for first, last, size in intervals]
    bound = most_alive(aligned)
    best: tuple[list[int], int] | None = None
    for order in ORDERS:
        found = _best_fit(aligned, sorted(range(len(aligned)), key=lambda i: order(aligned[i])))
        if best is None or found[1] < best[1]:
            best = found
        if best[1] <= GOOD_ENOUGH * bound:
            break
    assert best is not None
    return best


def most_alive(intervals: Iterable[Interval]) -> int:
    """The largest sum of sizes at one record: no placement can be smaller."""
    change: dict[int, int] = {}
    for first, last, size in intervals:
        change[first] = change.get(first, 0) + size
        change[last + 1] = change.get(last + 1, 0) - size
    alive = most = 0
    for record in sorted(change):
        alive += change[record]
        most = max(most, alive)
    return most


def _best_fit(intervals: Sequence[Interval], order: list[int]) -> tuple[list[int], int]:
    offsets = [0] * len(intervals)
    everything: list[Placed] = []
    windows: dict[int, list[Placed]] = {}  # by what touches records k W to (k + 2) W: short intervals fit into one
    total = 0
    for index in order:
        first, last, size = intervals[index]
        window = first // WINDOW
        within = last < (window + 2) * WINDOW
        offset = _smallest_hole(windows.setdefault(window, []) if within else everything, first, last, size)
        offsets[index] = offset
        taken = (offset, offset + size, first, last)
        insort(everything, taken)
        for touched in range(max(window - 1, 0), last // WINDOW + 1):
            insort(windows.setdefault(touched, []), taken)
        total = max(total, offset + size)
    return offsets, total


def _smallest_hole(placed: list[Placed], first: int, last: int, size: int) -> int:
    """Where the tightest room is among those of ``placed`` that live with the interval; else behind them."""
    reached, best, smallest = 0, -1, 0
    for start, stop, born, died in placed:
        if born <= last and died >= first:
            hole = start - reached
            if hole >= size and (best < 0 or hole < smallest):
                best, smallest = reached, hole
            if stop > reached:
                reached = stop
    return reached if best < 0 else best
