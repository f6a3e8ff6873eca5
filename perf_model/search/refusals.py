"""Families of plans that are not in the table, and what keeps each out: data, a sentence for people (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class FamilyKey(NamedTuple):
    """What all plans of a family share."""

    tp: int
    cp: int
    samples: int = 1  # of one micro-batch on one data rank
    micro_batches: int = 1

    def __str__(self) -> str:
        """``tp=4 cp=2``, and what else is more than one."""
        shown = {"tp": self.tp, "cp": self.cp}
        shown |= {name: n for name in ("samples", "micro_batches") if (n := getattr(self, name)) > 1}
        return " ".join(f"{name}={n}" for name, n in shown.items())

    @property
    def model_parallel(self) -> int:
        """Ranks that share one sample."""
        return self.tp * self.cp

    def global_batch(self, gpus: int) -> int:
        """Samples of a step on so many GPUs."""
        return gpus // self.model_parallel * self.samples * self.micro_batches


class RefusalKind(StrEnum):
    """What kind of number keeps a family out."""

    DIVIDES = "divides"  # a degree does not divide what it splits
    PLACEMENT = "placement"  # a group would lie where it cannot
    MICRO_BATCHES = "micro_batches"  # more than a plan may have
    MEMORY = "memory"
    HOST = "host"  # what is offloaded needs more host memory than there is
    SLOWER = "slower"  # it fits, and is not among the plans shown


@dataclass(frozen=True)
class Refusal:
    """A family that is not in the table, and the number that keeps it out.

    ``rule``: what is broken, with its numbers (``DIVIDES``, ``PLACEMENT``, ``MICRO_BATCHES``, ``HOST``).
    ``needs_bytes``, ``free_bytes``: of one rank, the least under full recompute, or under ``fixed`` if one was given,
    and what there is (``MEMORY``); ``full_bytes``: then the least under full recompute. ``slower``: seconds a sample
    over those of the last plan shown, less 1; ``at_least``: only a lower bound of it is known, no plan was played
    (``SLOWER``).
    """

    kind: RefusalKind
    family: FamilyKey
    rule: str = ""
    needs_bytes: float = 0.0
    free_bytes: float = 0.0
    fixed: str = ""
    full_bytes: float = 0.0
    slower: float = 0.0
    at_least: bool = False

    @property
    def reason(self) -> str:
        """The sentence that people read; no code does."""
        if self.kind is RefusalKind.MEMORY:
            need, free = self.needs_bytes / 1e9, self.free_bytes / 1e9
            if self.fixed in ("", "full"):
                return f"needs at least {need:.1f} GB even with full recompute; {free:.1f} GB are free"
            full = self.full_bytes / 1e9
            return (
                f"needs at least {need:.1f} GB with recompute={self.fixed}, which is fixed, {full:.1f} GB with full "
                f"recompute; {free:.1f} GB are free"
            )
        if self.kind is RefusalKind.SLOWER:
            least = "at least " * self.at_least
            if self.slower >= 1.0:
                return f"takes {least}{1.0 + self.slower:.1f} times as long for a sample as the last plan shown"
            return f"{least}{self.slower:.1%} slower for a sample than the last plan shown"
        return self.rule
