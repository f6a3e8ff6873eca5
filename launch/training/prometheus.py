"""``metrics.prom``: the last report of a run as Prometheus reads it, by the rule of node_exporter's textfile collector.

The file is replaced whole, and holds no times: a scrape has the collector's. Let ``--collector.textfile.directory`` be
the run's folder, or put a link to the file into that directory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...files import atomic_file
from .goodput import LossCause

PROM_FILE = "metrics.prom"
GAUGES = {  # of a report, by its name there: Prometheus' name, and what it is
    "loss": ("loss", "Mean training loss of the interval."),
    "gradient_norm": ("gradient_norm", "Mean gradient norm of the interval, before clipping."),
    "validation_loss": ("validation_loss", "Of the last validation."),
    "lr": ("learning_rate", "Of the last step."),
    "step_s": ("step_seconds", "Mean seconds of a step, with its loading."),
    "predicted_step_s": ("predicted_step_seconds", "The same as the cost model predicts it."),
    "predicted_over_measured": ("predicted_over_measured_ratio", "Of the seconds of a step."),
    "drifted": ("drifted", "1 while steps take longer beside their prediction than they did at first."),
    "tokens_per_s": ("tokens_per_second", "Of all ranks."),
    "mfu": ("mfu_ratio", "Model FLOPs over what the devices could do."),
    "memory_bytes": ("memory_bytes", "That rank 0 holds."),
    "predicted_memory_bytes": ("predicted_memory_bytes", "That a rank needs, as the planner counts."),
    "goodput": ("goodput_ratio", "Seconds of steps that count over all since the run first started."),
    "gpu_power_w": ("gpu_power_watts", "Mean of the job's GPUs."),
    "gpu_clock_mhz": ("gpu_clock_mhz", "Of the SMs, the slowest of the job's GPUs."),
    "gpu_temperature_c": ("gpu_temperature_celsius", "The hottest of the job's GPUs."),
    "gpu_ecc_errors": ("gpu_ecc_errors", "Uncorrected since the drivers were loaded, all GPUs of the job."),
    "gpus_slowed": ("gpus_slowed", "GPUs of the job whose clock is held down by heat, power or hardware."),
}
EDGES_S = tuple(1e-3 * 2.0**i for i in range(23))  # of the histogram of step times: 1 ms to 4,194 s


@dataclass
class PrometheusFile:
    """What is known so far, under the name of one run; every ``write`` says all of it."""

    path: Path
    run: str
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    counts: list[int] = field(default_factory=lambda: [0] * (len(EDGES_S) + 1))
    total_s: float = 0.0

    def write(
        self, step: int, values: Mapping[str, float], steps_s: Sequence[float], lost_s: Mapping[LossCause, float]
    ) -> None:
        """One more report: its values, its steps' seconds, and what was lost since the run first started."""
        self.step = step
        self.values |= {name: value for name, value in values.items() if name in GAUGES}
        for seconds in steps_s:
            self.counts[bisect_left(EDGES_S, seconds)] += 1
            self.total_s += seconds
        with atomic_file(self.path) as unfinished:
            unfinished.write_text("".join(f"{line}\n" for line in self._lines(lost_s)), encoding="utf-8")

    def _lines(self, lost_s: Mapping[LossCause, float]) -> Iterator[str]:
        run = f'run="{_escaped(self.run)}"'
        yield from _head("steps_total", "counter", "Steps that are done.")
        yield f"cinemesh_steps_total{{{run}}} {self.step}"
        for name, value in self.values.items():
            shown, told = GAUGES[name]
            yield from _head(shown, "gauge", told)
            yield f"cinemesh_{shown}{{{run}}} {value!r}"
        yield from _head("lost_seconds_total", "counter", "Wall seconds that no step that counts took, by cause.")
        for cause, seconds in lost_s.items():
            yield f'cinemesh_lost_seconds_total{{{run},cause="{cause}"}} {seconds!r}'
        yield from _head("step_duration_seconds", "histogram", "Of the steps of this start, with their loading.")
        below = 0
        for edge, count in zip((*map(repr, EDGES_S), "+Inf"), self.counts, strict=True):
            below += count
            yield f'cinemesh_step_duration_seconds_bucket{{{run},le="{edge}"}} {below}'
        yield f"cinemesh_step_duration_seconds_sum{{{run}}} {self.total_s!r}"
        yield f"cinemesh_step_duration_seconds_count{{{run}}} {below}"


def _head(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP cinemesh_{name} {told}"
    yield f"# TYPE cinemesh_{name} {kind}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
