"""The first minutes on a GPU: is it the card that we think, do kernels and steps compute the right thing, how fast?

    python tests/benchmarks/first_gpu.py --out DIR [--seconds 540] [--only 0 4] [--smoke]

For a machine that may have another torch than ours, no network, and the checkout on PYTHONPATH alone (a symbolic link
``cinemesh``). It needs torch, triton, numpy, pyyaml, safetensors, rich, typer and, for stages 1 and 3, pytest and
hypothesis. What there is to know first comes first; no stage takes the time of another:

    0  machine   versions, driver, clocks, power; a copy of 2 GiB; a bf16 product of 8192^3
    2  parity    steps on the card against plain autograd in float64
    4  timings   the kernels of the 30B step, beside their prices; writes card.json, for calibrate --card
    6  rank      one rank of the 30B step: eager, captured, replayed, beside the price by stage 4's rates
    1  kernels   every Triton kernel against float64
    7  training  two blocks at the 30B's width: loss, MFU beside its prediction, save and resume
    3  marked    the tests marked gpu
    5  tiles     a handful of attention tiles

Each is a process of its own, killed when its time is over; what one leaves is for the next ones, up to as much again
as their own.
``DIR/first_gpu.json`` is written anew after every stage: ``smoke``, ``date``, and ``stages``, each with ``number``,
``name``, ``ended`` (``ok``, ``failed``, ``out of time``, ``not begun``), ``seconds`` and what it ``found``.
There ``predicted`` stands beside ``measured`` under the same names. What a stage printed is in ``DIR/NAME.log``.

``--smoke`` runs every stage where there is no GPU: CUDA is pretended, Triton interpreted, shapes are tiny. Its times
are called ``smoke``: they measure nothing. Exit code 1 where a stage did not end well.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:  # run as a script: its stages are found as the tests find each other
    sys.path.insert(0, str(TESTS))

RESULT = "first_gpu.json"
LEAST_S = 5.0  # of a stage: with less it is not begun
END_S = 10.0  # what a killed process gets to disappear


@dataclass(frozen=True)
class Stage:
    """``seconds``: its part of the whole time; ``module``, ``function``: what it runs."""

    number: int
    name: str
    seconds: float
    module: str
    function: str = "run"


# By what there is to know first. Together 540 s, by what each took on an H200 with 16 cores (2026-11-29).
STAGES = (
    Stage(0, "machine", 25, "machine"),
    Stage(2, "parity", 65, "parity"),
    Stage(4, "timings", 50, "timings"),
    Stage(6, "rank", 60, "rank"),
    Stage(1, "kernels", 75, "suite", "kernels"),
    Stage(7, "training", 130, "training"),
    Stage(3, "marked", 65, "suite", "marked"),
    Stage(5, "tiles", 70, "tiles"),
)


# -- one stage, in its own process ------------------------------------------------------------------------------------


def work(stage: Stage, folder: Path, smoke: bool) -> int:
    """Load what the stage needs, wait for the word to begin, run it. What was found, or what failed, is in its file."""
    import torch
    from benchmarks.on_card.stage import Here
    from benchmarks.pretended_cuda import pretended

    from cinemesh.errors import CinemeshError

    with pretended() if smoke else nullcontext("cuda") as place:
        module = importlib.import_module(f"benchmarks.on_card.{stage.module}")
        seconds = float(sys.stdin.readline())
        signal.alarm(int(seconds + END_S))  # where nobody is left to kill it
        here = Here(place, smoke, time.monotonic() + seconds, folder, file_of(stage, folder))
        try:
            if not smoke and not torch.cuda.is_available():
                raise CinemeshError("there is no GPU here", remedy="try the stages without one: --smoke")
            getattr(module, stage.function)(here)
        except BaseException as error:  # noqa: BLE001  whatever ends a stage is told, and ends that stage alone
            traceback.print_exc()
            here.note(error=f"{type(error).__name__}: {error}"[:2000], traceback=traceback.format_exc()[-4000:])
            return 1
    return 0


def file_of(stage: Stage, folder: Path) -> Path:
    return folder / f"{stage.name}.json"


# -- all of them ------------------------------------------------------------------------------------------------------


class Child:
    """A stage's process, in a group of its own. It loads what it needs at once, and begins when it is told to."""

    def __init__(self, stage: Stage, folder: Path, command: Sequence[str]) -> None:
        self.stage, self.folder = stage, folder
        file_of(stage, folder).unlink(missing_ok=True)
        # The interpreter's many small calls: threads that wait awake would hold the cores of a shared machine.
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if "--smoke" in command else {})
        self._log = (folder / f"{stage.name}.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [*command, "--stage", str(stage.number)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def run(self, seconds: float) -> dict[str, Any]:
        """Let it work for so long at most; how it ended, and what it found by then."""
        begun = time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died while it loaded: its log says why
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.close()
        try:
            ended = "ok" if self._process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        self.kill()
        file = file_of(self.stage, self.folder)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return row(self.stage, ended, time.monotonic() - begun, found)

    def kill(self) -> None:
        """With all that it started. One that the kernel does not give up is left behind."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._log.close()


def row(stage: Stage, ended: str, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    head = {"number": stage.number, "name": stage.name, "ended": ended}
    return head | {"seconds": round(seconds, 1), "found": found}


def run(stages: Sequence[Stage], folder: Path, seconds: float, command: Sequence[str], *, smoke: bool) -> int:
    """Every stage in turn, ``command`` with its number; the exit code.

    Each has to end by its place in the schedule. The next one's process loads meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun, scale = time.monotonic(), seconds / sum(stage.seconds for stage in stages)
    rows: list[dict[str, Any]] = []
    due = 0.0
    child: Child | None = None
    try:
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            due += scale * stage.seconds
            child = child or Child(stage, folder, command)
            after = Child(following, folder, command) if following else None
            left = min(begun + due - time.monotonic(), 2 * scale * stage.seconds)
            if left < min(LEAST_S, 0.5 * scale * stage.seconds):
                child.kill()
                rows.append(row(stage, "not begun", 0.0, {}))
            else:
                rows.append(child.run(left))
            child = after
            write(rows, folder, smoke)
            print(said(rows[-1]), flush=True)
    finally:
        if child is not None:
            child.kill()
    print(f"wrote {folder / RESULT}")
    return 0 if all(stage["ended"] == "ok" for stage in rows) else 1


def write(rows: Sequence[dict[str, Any]], folder: Path, smoke: bool) -> None:
    """Whole or not at all."""
    values = {"smoke": smoke, "date": date.today().isoformat(), "stages": rows}
    part = folder / f".{RESULT}.part"
    part.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(part, folder / RESULT)


def said(stage: dict[str, Any]) -> str:
    """A stage in a line, and below it what it measured beside what was predicted."""
    lines = [f"{stage['number']} {stage['name']:<10}{stage['ended']:<12}{stage['seconds']:7.1f} s"]
    if "error" in stage["found"]:
        lines.append(f"    {stage['found']['error'].splitlines()[0]}")
    lines += [f"    {what}: no" for what, found in stage["found"].items() if found is False]
    for what, values in stage["found"].items():
        if isinstance(values, dict) and "predicted" in values:
            ran = next(name for name in values if name != "predicted")
            for name, predicted in values["predicted"].items():
                lines.append(f"    {what} {name}: predicted {number(predicted)}, {ran} {number(values[ran][name])}")
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is written")
    parser.add_argument("--seconds", type=float, default=sum(stage.seconds for stage in STAGES))
    parser.add_argument("--only", type=int, nargs="*", choices=sorted(stage.number for stage in STAGES))
    parser.add_argument("--smoke", action="store_true", help="without a GPU; measures nothing")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage is not None:
        return work(next(stage for stage in STAGES if stage.number == given.stage), given.out, given.smoke)
    stages = [stage for stage in STAGES if given.only is None or stage.number in given.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # its stage ends with it
    command = [sys.executable, __file__, "--out", str(given.out), *(["--smoke"] if given.smoke else [])]
    return run(stages, given.out, given.seconds, command, smoke=given.smoke)


if __name__ == "__main__":
    sys.exit(main())
