"""The least error over positive numbers, one moved after the other (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def descend(
    values: Sequence[float],
    error: Callable[[Sequence[float]], float],
    steps: Sequence[float],
    *,
    gain: float,
    least: float = 0.0,
    most: float = math.inf,
) -> list[float]:
    """``values`` moved to where the error is least, as far as this finds it; none of them leaves ``least`` to ``most``.

    Each is multiplied or divided by the first of ``steps`` as long as that lowers the error by the share ``gain`` of
    it, then by the next one.
    """
    best = [*values]
    smallest = error(best)
    for step in steps:
        moved = True
        while moved:
            moved = False
            for i in range(len(best)):
                for factor in (step, 1.0 / step):
                    tried = [*best]
                    tried[i] = max(least, min(best[i] * factor, most))
                    found = error(tried)
                    if found < smallest * (1.0 - gain):
                        best, smallest, moved = tried, found, True
                        break
    return best
