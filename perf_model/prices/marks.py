"""What it costs that a captured step tells where it stands, by the records of ``ir/marks.py`` (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass

from ...parallel.passes.mark import mark
from ..clusters.cluster import Cluster
from .played import PlayedStep, play_program


@dataclass(frozen=True, kw_only=True)
class MarksCost:
    """Marks of a step, and what they add to it. Each is priced as a kernel of its own that moves 16 bytes."""

    records: int
    seconds: float
    share: float

    def told(self) -> str:
        """The same in a line."""
        return (
            f"marks, by which a hang inside a captured step is told: {self.records:,} records, "
            f"{self.seconds:.2g} s of a step more ({self.share:.2%}); marks: off leaves them out"
        )


def marks_cost(step: PlayedStep, cluster: Cluster) -> MarksCost | None:
    """Of a step without marks; None where the host runs it, and tells by itself."""
    if cluster.device == "cpu" or not cluster.captured:
        return None
    marked = mark(step.program)
    seconds = play_program(marked, step.batch, cluster, step.frozen).step_s - step.step_s
    return MarksCost(records=len(marked.ops) - len(step.program.ops), seconds=seconds, share=seconds / step.step_s)
