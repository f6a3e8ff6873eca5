"""Whether a run's steps still take as long, beside their prediction, as they did at first."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

SETTLED = 3  # reports whose median is what the others are held to: the first has warm-up in it
DRIFTED = 1.1  # times as long: beyond what clocks and neighbours change from one interval to the next (H200: 2 %)


@dataclass
class Drift:
    """Of one start. ``ratios``: predicted over measured, of the first reports."""

    ratios: list[float] = field(default_factory=list)
    drifted: bool = False

    def look(self, ratio: float) -> str | None:
        """One more report's predicted over measured: what there is to say, when that changes."""
        if len(self.ratios) < SETTLED:
            self.ratios.append(ratio)
            return None
        at_first = statistics.median(self.ratios)
        longer = at_first / ratio
        if (longer > DRIFTED) == self.drifted:
            return None
        self.drifted = not self.drifted
        told = f"predicted / measured is {ratio:.3g}, and was {at_first:.3g} at first"
        if self.drifted:
            return f"WARNING: steps have become {longer:.2f} times as long: {told}. Look at clocks, links and storage"
        return f"steps are as long as at first again: {told}"
