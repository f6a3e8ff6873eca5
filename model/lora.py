"""Low-rank factors beside frozen weights: which products have them, and what they are called (torch-free)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import CinemeshError, did_you_mean

# Products of a block that factors may be added to, and how many of their first dims are summed over.
LORA_TARGETS = {"q": 1, "kv": 1, "o": 2, "cross.q": 1, "cross.kv": 1, "cross.o": 2, "gate": 1, "up": 1, "down": 1}


@dataclass(frozen=True)
class Lora:
    """Low-rank factors beside frozen weights: y = x W + alpha / rank (x A) B (Hu et al. 2021, arXiv 2106.09685, 4.1).

    Only A and B of the ``targets`` are trained. K and V are one product, so they have one A.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(LORA_TARGETS)

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise CinemeshError(f"lora: rank is {self.rank!r:.200}", remedy="it must be a whole number of at least 1")
        if not 0 < self.alpha < math.inf:
            raise CinemeshError(f"lora: alpha is {self.alpha!r:.200}", remedy="it must be a positive number")
        if not self.targets or len({*self.targets}) < len(self.targets):
            raise CinemeshError(
                f"lora: targets are {list(self.targets)}", remedy=f"name some of {', '.join(LORA_TARGETS)}, each once"
            )
        if (unknown := next((name for name in self.targets if name not in LORA_TARGETS), None)) is not None:
            raise CinemeshError(f"lora: targets name {unknown!r:.200}", remedy=did_you_mean(unknown, LORA_TARGETS))

    @property
    def scale(self) -> float:
        """Of what the factors add."""
        return self.alpha / self.rank


def factors_of(target: str) -> tuple[str, str]:
    """What A and B of a block's product are called in it."""
    flat = target.replace(".", "_")
    return f"lora_A.{flat}", f"lora_B.{flat}"
