"""``predicted.yaml``: what the cost model says of a run's steps, beside the run (torch-free).

Written before the run's mesh exists, by who may ask the cost model. The loop says it beside what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from ...errors import CinemeshError, in_a_line
from ...files import atomic_file
from ...parallel.ir.plan import Plan

PREDICTED_FILE = "predicted.yaml"
HEAD = "# Steps of this run as the cost model sees them: predicted, not measured.\n"


@dataclass(frozen=True)
class Predicted:
    """Of one start of a run.

    ``device``: cuda or cpu, what the cluster has. ``step_s``: by latent, as ``latent_text`` writes it. ``peak_bytes``:
    of one rank, in the bucket that needs most. ``peak_flops_per_s``: of one device in the plan's compute dtype; None
    where the cluster has a placeholder for it.
    """

    plan: Plan
    cluster: str
    device: str
    step_s: Mapping[str, float]
    peak_bytes: int
    peak_flops_per_s: float | None

    def write(self, directory: Path) -> None:
        """Into a run's directory, whole or not at all."""
        values = asdict(self) | {"plan": self.plan.to_dict()}
        with atomic_file(directory / PREDICTED_FILE) as unfinished:
            unfinished.write_text(HEAD + yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def read(cls, directory: Path) -> Predicted | None:
        """That of a run's directory, if there is one. Raises CinemeshError for a file that is none."""
        path = directory / PREDICTED_FILE
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
            return cls(**values | {"plan": Plan.from_dict(values["plan"])})
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
            raise CinemeshError(
                f"{path}: cannot be read: {in_a_line(error)}", remedy="remove it: every start of a run writes it anew"
            ) from None
