"""``predicted.yaml``: what the cost model says of a run's steps, beside the run (torch-free).

Written before the run's mesh exists, by who may ask the cost model. The loop says it beside what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType

from ...documents import exactly, read_yaml, write_yaml
from ...files import atomic_file
from ...parallel.ir.plan import Plan

PREDICTED_FILE = "predicted.yaml"
KINDS: dict[str, type | UnionType] = {
    "plan": dict,
    "cluster": str,
    "device": str,
    "step_s": dict,
    "peak_bytes": int,
    "peak_flops_per_s": int | float | None,
    "compute_s": dict,
}
HEAD = "# Steps of this run as the cost model sees them: predicted, not measured.\n"


@dataclass(frozen=True)
class Predicted:
    """Of one start of a run.

    ``device``: cuda or cpu, what the cluster has. ``step_s``: by latent, as ``latent_text`` writes it. ``peak_bytes``:
    of one rank, in the bucket that needs most. ``peak_flops_per_s``: of one device in the plan's compute dtype; None
    where the cluster has a placeholder for it. ``compute_s``: of each step, what a rank computes.
    """

    plan: Plan
    cluster: str
    device: str
    step_s: Mapping[str, float]
    peak_bytes: int
    peak_flops_per_s: float | None
    compute_s: Mapping[str, float] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Into a run's directory, whole or not at all."""
        values = asdict(self) | {"plan": self.plan.to_dict()}
        with atomic_file(directory / PREDICTED_FILE) as unfinished:
            unfinished.write_text(HEAD + write_yaml(values), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Predicted | None:
        """That of a run's directory, if there is one. Raises CinemeshError for a file that is none."""
        path = directory / PREDICTED_FILE
        if not path.exists():
            return None
        remedy = "remove it: every start of a run writes it anew"
        values = exactly(read_yaml(path, "the predictions", remedy), str(path), KINDS, remedy=remedy)
        values["plan"] = Plan.of_file(values)
        return cls(**values)
