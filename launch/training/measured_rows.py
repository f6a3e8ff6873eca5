"""``rows.yaml``: what the steps of a run took, in the form that ``cinemesh validate`` reads and predicts.

One row for each latent of each start of a run, written with every checkpoint, so that an interrupted run has them. Rows
of earlier starts stay, unless a start begins at the same step as one of them.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...documents import quoted, read_yaml, write_yaml
from ...errors import CinemeshError
from ...files import atomic_file
from ...kernels.packages import version_of
from ...kernels.selection import Software
from ...model.buckets import BucketRunner, Latent
from ...model.config import latent_text
from ...model.runner import StepRunner
from ..cluster.environment import processes_here

if TYPE_CHECKING:  # a recipe's reader is not on every machine that measures
    from .recipe import Config

ROWS_FILE = "rows.yaml"
WARM_UP_STEPS = 3  # of each latent in each start: allocators, caches and clocks settle
LEAST_STEPS = 3  # behind them, of which a median is one
LATEST_STEPS = 10_000  # of each latent, the last ones: more change no median
BEYOND = 20  # of as many steps, one lies beyond either end of the spread that is told: nine of ten lie within
NO_CLUSTER = "local-cpu"  # what CPU processes are predicted on where the recipe names no cluster
VERSIONS = ("cinemesh", "torch", "triton")  # of a row, beside those of optional packages
HEAD = "# Measured steps of this run; cinemesh validate predicts them.\n"


@dataclass
class StepTimes:
    """Of the steps of one latent behind the warm-up: seconds, and those that each waited for its samples before."""

    begun: int = 0
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))
    loading_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))

    def add(self, step_s: float, loading_s: float) -> None:
        """One more step."""
        self.begun += 1
        if self.begun > WARM_UP_STEPS:
            self.step_s.append(step_s)
            self.loading_s.append(loading_s)

    def measured(self) -> dict[str, Any] | None:
        """What a row says of them; None where they are too few."""
        step_s = sorted(self.step_s)
        if len(step_s) < LEAST_STEPS:
            return None
        beyond = len(step_s) // BEYOND
        return {
            "iter_time_s": statistics.median(step_s),
            "iter_time_low_s": step_s[beyond],
            "iter_time_high_s": step_s[-1 - beyond],
            "loading_s": statistics.median(self.loading_s),
            "steps": len(step_s),
            "warm_up_steps": WARM_UP_STEPS,
        }


class MeasuredRows:
    """Gathers the steps of one start of a run, and writes their rows beside those of earlier starts.

    Raises CinemeshError where the file of earlier ones is none.
    """

    def __init__(self, config: Config, runners: BucketRunner, latents: Sequence[Latent]) -> None:
        self._device, directory = runners.first.executor.device, config.logging.directory
        self._path, first = directory / ROWS_FILE, runners.first.steps_done
        software = Software.here(config.kernels, config.deterministic)
        shapes = list(dict.fromkeys(latents))
        self._shape = [shapes.index(latent) for latent in latents]  # of each bucket
        self._rows = [
            own_row(
                runners.runners[latent],
                software,
                config.cluster,
                name=f"{directory.name}/{latent_text(latent)}/from-step-{first}",
                title=str(directory),
            )
            for latent in shapes
        ]
        self._times = [StepTimes() for _ in shapes]
        own = {row["id"] for row in self._rows}
        self._earlier = [row for row in _read(self._path) if not (isinstance(row, dict) and row.get("id") in own)]

    def add(self, bucket: int, step_s: float, loading_s: float) -> None:
        """One more step, of the bucket at this place."""
        self._times[self._shape[bucket]].add(step_s, loading_s)

    def write(self) -> None:
        """All rows of which there are steps enough, whole or not at all."""
        rows = [
            row | {"measured": measured}
            for row, times in zip(self._rows, self._times, strict=True)
            if (measured := times.measured()) is not None
        ]
        if not rows:
            return
        told = [dated(row, self._device) for row in rows]
        write_rows(self._path, self._earlier + told)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """A file for ``cinemesh validate``, whole or not at all."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(HEAD + write_yaml(rows), encoding="utf-8")


def _read(path: Path) -> list[Any]:
    if not path.exists():
        return []
    rows = read_yaml(path, "the measured rows", "move it away, and this start writes another")
    if not isinstance(rows, list):
        raise CinemeshError(
            f"the measured rows {path} are {quoted(rows)}, no list",
            remedy="move it away, and this start writes another",
        )
    return rows


def own_row(runner: StepRunner, software: Software, cluster: str | None, *, name: str, title: str) -> dict[str, Any]:
    """A row of a runner's steps, but for its date, its clock and what was measured. ``cluster``: None, not known."""
    device, plan, batch = runner.executor.device, runner.plan, runner.batch
    return {
        "id": name,
        "kind": "own_step",
        "source": {"title": title, "date": ""},
        "hardware": {
            "gpu": "CPU core" if device == "cpu" else torch.cuda.get_device_name(device),
            "gpus": plan.world_size,
            "gpus_per_node": processes_here(plan.world_size),
            "cluster": cluster or (NO_CLUSTER if device == "cpu" else None),
            "clock_mhz": None,
        },
        "software": {
            "versions": versions((*VERSIONS, *software.packages)),
            "packages": list(software.packages),
            "kernels": dict(software.overrides),
            "deterministic": software.deterministic,
            "captured": runner.replay is not None,
        },
        "model": asdict(runner.config),
        "shape": {
            "latent": list(batch.latent),
            "samples": batch.samples,
            "global_batch": batch.samples * plan.data_ranks * plan.micro_batches,
        },
        "plan": plan.to_dict(),
    }


def dated(row: dict[str, Any], device: str) -> dict[str, Any]:
    """The row with today's date and the clock that the device has now."""
    source = row["source"] | {"date": date.today().isoformat()}
    return row | {"source": source, "hardware": row["hardware"] | {"clock_mhz": clock_mhz(device)}}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed under this name."""
    return {package: there for package in packages if (there := version_of(package)) is not None}


def clock_mhz(device: str) -> int | None:
    """Of the SMs in the driver's last sample; None of a CPU, or where the driver does not tell."""
    if device == "cpu":
        return None
    import pynvml

    try:
        return torch.cuda.clock_rate(device) or None
    except (RuntimeError, pynvml.NVMLError):  # on parts of a GPU, and without the driver's library
        return None
