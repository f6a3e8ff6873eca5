"""Stages 1 and 3: tests of the suite. Every Triton kernel against float64; what is marked ``gpu``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.on_card.stage import Here

ROOT = Path(__file__).parents[3]
SMOKE_KERNELS = ("tests/kernels/test_swiglu.py", "tests/kernels/test_merge.py")
MARK = "mark.gpu"
NEEDED_BY_LAUNCH = ("pydantic", "av")  # by the fixtures of tests/launch
MOST_PROCESSES = 12  # each has a CUDA context of half a GB
LEFT_S = 3.0  # of the stage's time, to read what was told


def kernels(here: Here) -> None:
    run(here, SMOKE_KERNELS if here.smoke else files_of_kernels())


def marked(here: Here) -> None:
    """By file, for a module of the suite may need packages that are not there; where CUDA is pretended, all skip."""
    run(here, files_with_mark(), "-m", "gpu")


def files_of_kernels() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]


def files_with_mark() -> list[str]:
    """Not those of ``launch`` where its fixtures cannot load: stage 2 proves what its marked tests do."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    left_out = () if all(map(find_spec, NEEDED_BY_LAUNCH)) else (ROOT / "tests" / "launch",)
    return [
        str(path.relative_to(ROOT))
        for path in tests
        if MARK in path.read_text(encoding="utf-8") and not any(path.is_relative_to(folder) for folder in left_out)
    ]


def run(here: Here, files: Sequence[str], *options: str) -> None:
    """pytest on every file until all end, or this stage nearly does.

    Many at once, for a GPU's kernels are compiled on one core each; in processes of their own, for it is decided when a
    module is imported how Triton runs.
    """
    waiting, running, codes = [*files], dict[str, subprocess.Popen[bytes]](), dict[str, int | None]()
    most = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    folder = here.folder / here.file.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    while (waiting or running) and here.left_s > LEFT_S:
        while waiting and len(running) < most:
            file = waiting.pop(0)
            running[file] = started(file, folder, options)
        time.sleep(0.1)
        for file, process in [*running.items()]:
            if process.poll() is not None:
                codes[file] = running.pop(file).returncode
    for process in running.values():
        process.kill()
        process.wait()
    unfinished = dict.fromkeys([*running, *waiting])
    here.note(**summary(folder), exit_codes=codes | unfinished)


def started(file: str, folder: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    outcomes = folder / f"{file.replace('/', '.')}.jsonl"
    plugin = ("-p", "benchmarks.on_card.reported", "--outcomes", str(outcomes.resolve()))
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *plugin, *options, file]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})


def summary(folder: Path) -> dict[str, Any]:
    """How many passed; which failed, with what they said; why which were skipped, and how many."""
    files = sorted(folder.glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    return {
        "passed": sum(row["outcome"] == "passed" for row in rows),
        "failed": [row for row in rows if row["outcome"] == "failed"],
        "skipped": dict(Counter(row["said"] for row in rows if row["outcome"] == "skipped")),
    }
