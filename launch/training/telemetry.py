"""Telemetry: where a run's reports go, on rank 0: TensorBoard, a JSON line each, a log, standard output or a bar.

Below ``logging.directory``: ``tensorboard/``, one event file for each start of the run, with clips; ``metrics.jsonl``,
whose lines read ``{"step": 10, "loss": 1.2, ...}``; ``metrics.prom``, for Prometheus; ``goodput.json``, where the time
went; and ``train.log``, all that was said, with its time.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
from tqdm import tqdm

from ...documents import parse_json
from ...files import atomic_file
from .goodput import GoodputAccount
from .prometheus import PROM_FILE, PrometheusFile

P = ParamSpec("P")
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
BESIDE = {  # charts of TensorBoard that show what was measured and what was predicted
    "step, s": ["Multiline", ["step_s", "predicted_step_s"]],
    "memory, bytes": ["Multiline", ["memory_bytes", "predicted_memory_bytes"]],
}
RGB = 3  # tensorboard/compat/proto/summary.proto: Image.colorspace
SUPERSEDED_FILE = "metrics.superseded.jsonl"  # reports of steps that a run took again


def _timed(method: Callable[Concatenate[Telemetry, P], None]) -> Callable[Concatenate[Telemetry, P], None]:
    """Of what telemetry does between steps: the seconds that its thread computes."""

    def timed(self: Telemetry, *args: P.args, **kwargs: P.kwargs) -> None:
        since = time.thread_time()
        method(self, *args, **kwargs)
        self.cpu_s += time.thread_time() - since

    timed.__doc__ = method.__doc__
    return timed


class Telemetry:
    """Reports of one run. Steps count finished updates; a resumed run sets aside what is later than its ``first``.

    ``since``: when this start began, of the epoch; now unless told. ``account``: where the time of all starts went.
    ``cpu_s``: CPU seconds of this thread in telemetry.
    """

    def __init__(self, directory: Path, steps: int, first: int, since: float | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports warn
            from torch.utils.tensorboard.writer import SummaryWriter
        directory.mkdir(parents=True, exist_ok=True)
        since = time.time() if since is None else since
        self.cpu_s = 0.0
        self.account = GoodputAccount.of(directory, first, since)
        self._prometheus = PrometheusFile(directory / PROM_FILE, directory.name, first)
        self._directory = directory
        _set_aside(directory / METRICS_FILE, first)
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1 if first else None)
        self._writer.add_custom_scalars({"measured and predicted": BESIDE})
        self._log = (directory / LOG_FILE).open("a", encoding="utf-8", buffering=1)
        self._bar = tqdm(total=steps, initial=first, desc="training", unit="step", dynamic_ncols=True, disable=None)

    @_timed
    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    @_timed
    def interval(self, step: int, values: dict[str, float], steps_s: Sequence[float]) -> None:
        """Report numbers of the steps since the last one, each with its seconds."""
        now = time.time()
        values = values | {"goodput": self.account.settle(now)}
        self._writer.add_histogram("step_s/of each", np.asarray(steps_s), step)
        self._scalars(step, values)
        self._prometheus.write(step, values, steps_s, self.account.lost_s)
        self.account.write(now)

    @_timed
    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Report numbers; those of training also stand beside the progress bar."""
        self._scalars(step, values)
        self._prometheus.write(step, values, (), self.account.lost_s)

    def picture(self, step: int, name: str, height: int, width: int, gif: bytes) -> None:
        """An image that moves."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        assert self._writer.file_writer is not None
        image = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=gif)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self.append(METRICS_FILE, {"step": step, **values})
        if "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['lr']:.2e}")

    def append(self, name: str, values: dict[str, Any]) -> None:
        """A line of JSON at the end of a file of the run."""
        with (self._directory / name).open("ab", buffering=0) as file:
            file.write((json.dumps(values) + "\n").encode())  # one write: a reader never sees half a line

    def say(self, text: str) -> None:
        """A line above the progress bar, and in the log."""
        self._write(text)
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def say_step(self, text: str) -> None:
        """A line on the steps: in the log, and on standard output unless that is the terminal that shows the bar."""
        if self._bar.disable or not sys.stdout.isatty():
            self.say(text)
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def close(self) -> None:
        self._bar.close()
        self._writer.close()
        self._log.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The reports of a run, in order. A last line that a kill cut short is left out."""
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [parse_json(line, f"a line of {path}", "remove it, and the curve loses it") for line in whole.splitlines()]


def _set_aside(path: Path, step: int) -> None:
    """Reports later than ``step`` go to the end of another file: none is lost."""
    rows = read_metrics(path.parent)
    lines = {late: "".join(json.dumps(row) + "\n" for row in rows if (row["step"] > step) == late) for late in (0, 1)}
    if lines[1]:
        with (path.parent / SUPERSEDED_FILE).open("a", encoding="utf-8") as file:
            file.write(lines[1])
    with atomic_file(path) as part:
        part.write_text(lines[0], encoding="utf-8")
