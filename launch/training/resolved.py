"""``resolved.yaml``: what ``plan: auto`` stands for in a run, plan and batch, beside the run (torch-free).

Written once, before the run's mesh exists; whoever reads the recipe reads the plan here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.batches import Batches
from ...documents import exactly, quoted, read_yaml, write_yaml
from ...errors import CinemeshError
from ...files import atomic_file
from ...parallel.ir.plan import Plan

FILE = "resolved.yaml"
KINDS = {
    "cluster": str,
    "world_size": int,
    "step_s": float,
    "peak_bytes": int,
    "full_ranks": int,
    "global_batches": list,
    "plan": dict,
}
HEAD = "# The plan that `plan: auto` stands for in this run. Step and bytes are predicted, not measured.\n"


@dataclass(frozen=True)
class Resolved:
    """A plan that the planner chose, on which cluster's prices. ``peak_bytes`` of one rank.

    ``full_ranks``: the most processes that the run had; ``global_batches``: samples of a step of every bucket, the
    recipe's, or fewer where these do not divide over what is left of so many.
    """

    plan: Plan
    cluster: str
    step_s: float
    peak_bytes: int
    full_ranks: int
    global_batches: Batches

    def write(self, directory: Path) -> None:
        """Into a run's directory, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            "cluster": self.cluster,
            "world_size": self.plan.world_size,
            "step_s": self.step_s,
            "peak_bytes": self.peak_bytes,
            "full_ranks": self.full_ranks,
            "global_batches": list(self.global_batches),
            "plan": self.plan.to_dict(),
        }
        with atomic_file(directory / FILE) as unfinished:
            unfinished.write_text(HEAD + write_yaml(values), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Resolved | None:
        """That of a run's directory, if there is one. Raises CinemeshError for a file that is none."""
        path = directory / FILE
        if not path.exists():
            return None
        remedy = "remove it, and the plan is chosen again"
        values = exactly(read_yaml(path, "the resolved plan", remedy), str(path), KINDS, remedy=remedy)
        batches = tuple(values["global_batches"])
        if not batches or not all(type(size) is int and size > 0 for size in batches):
            raise CinemeshError(f"{path}: global_batches is {quoted(values['global_batches'])}", remedy=remedy)
        step_s, peak_bytes, full_ranks = (values[name] for name in ("step_s", "peak_bytes", "full_ranks"))
        return cls(Plan.of_file(values), values["cluster"], step_s, peak_bytes, full_ranks, batches)
