"""``resolved.yaml``: the plan that ``plan: auto`` stands for in a run, beside the run (torch-free).

Written once, before the run's mesh exists; whoever reads the recipe reads the plan here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import CinemeshError, in_a_line
from ...files import atomic_file
from ...parallel.ir.plan import Plan

FILE = "resolved.yaml"
HEAD = "# The plan that `plan: auto` stands for in this run. Step and bytes are predicted, not measured.\n"


@dataclass(frozen=True)
class Resolved:
    """A plan that the planner chose, on which cluster's prices. ``peak_bytes`` of one rank."""

    plan: Plan
    cluster: str
    step_s: float
    peak_bytes: int

    def write(self, directory: Path) -> None:
        """Into a run's directory, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            "cluster": self.cluster,
            "world_size": self.plan.world_size,
            "step_s": self.step_s,
            "peak_bytes": self.peak_bytes,
            "plan": self.plan.to_dict(),
        }
        with atomic_file(directory / FILE) as unfinished:
            unfinished.write_text(HEAD + yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def read(cls, directory: Path) -> Resolved | None:
        """That of a run's directory, if there is one. Raises CinemeshError for a file that is none."""
        path = directory / FILE
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
            return cls(Plan.from_dict(values["plan"]), values["cluster"], values["step_s"], values["peak_bytes"])
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
            raise CinemeshError(
                f"{path}: cannot be read: {in_a_line(error)}", remedy="remove it, and the plan is chosen again"
            ) from None
