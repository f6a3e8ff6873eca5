"""Numbers close to those asked for that split better: another global batch, fewer GPUs (torch-free)."""

from __future__ import annotations

import math

from .request import Request

REACH = 0.05  # of a batch: how far its neighbours are looked for; farther off, training is another one
BETTER = 4  # times as large a common divisor makes a number worth a search
SERVERS = 16  # left out at most: a tray or two of a cluster of any size
SEARCHED = 2  # numbers of GPUs, those that split best


def close_batches(request: Request) -> list[int]:
    """The next smaller and the next larger batch that have far larger divisors in common with the GPUs, most first."""
    asked = request.global_batch
    if asked is None:
        return []
    found: list[int] = []
    reach = max(1, int(asked * REACH))
    for side in (range(asked - 1, max(0, asked - reach - 1), -1), range(asked + 1, asked + reach + 1)):
        best = max(side, key=lambda batch: math.gcd(batch, request.gpus), default=asked)  # the nearest of equal ones
        if math.gcd(best, request.gpus) >= BETTER * math.gcd(asked, request.gpus):
            found.append(best)
    return sorted(found, key=lambda batch: -math.gcd(batch, request.gpus))


def fewer_gpus(request: Request) -> list[int]:
    """Whole servers less that split into far more groups."""
    server = request.cluster.gpus_per_server
    last = (request.gpus - 1) // server
    counts = [server * servers for servers in range(last, max(0, last - SERVERS), -1)]
    more = [gpus for gpus in counts if _smooth(gpus) >= BETTER * _smooth(request.gpus)]
    return sorted(more, key=_smooth, reverse=True)[:SEARCHED]


def _smooth(gpus: int) -> int:
    """The part of a number that heads, widths and tokens divide by: factors of 2 and 3."""
    return math.gcd(gpus, 2**16 * 3**8)
