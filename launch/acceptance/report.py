"""What an acceptance run leaves behind: one JSON, a log, and a table on the terminal. Rank 0 writes them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ...files import atomic_file
from ...kernels.packages import version_of
from ...perf_model.acceptance import ACCEPTANCE_FILE, DATE, DEVICE, FOUND, NAME, STAGE_ROWS
from ..tables import new_console, plain_table
from .here import FAULTS, SAID

LOG = "acceptance.log"
OK, WRONG, FAILED, LATE, LOST, NOT_BEGUN, RUNNING = (
    "ok",  # all that it looked at is as it must be
    "wrong",  # it ran to its end and found faults
    "failed",  # a rank ended otherwise than it should
    "out of time",  # a rank had not ended at the deadline
    "lost",  # a rank does not answer any more: nothing can follow
    "not begun",  # no time was left
    "running",
)
VERDICT, WELL, NOT_WELL = "verdict", "well", "not well"


@dataclass
class AcceptanceReport:
    """``rows``: one a stage, as in the file."""

    folder: Path
    head: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begun(cls, folder: Path, world: int, local: int, seconds: float) -> AcceptanceReport:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).write_text("", encoding="utf-8")
        head = {
            DATE: date.today().isoformat(),
            "cinemesh": version_of("cinemesh"),
            "ranks": world,
            "ranks_a_host": local,
            "asked_s": seconds,
            DEVICE: None,
            VERDICT: RUNNING,
        }
        return cls(folder, head)

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def well(self) -> bool:
        return bool(self.rows) and all(row["ended"] == OK for row in self.rows)

    def write(self) -> None:
        """The JSON as it stands, whole or not at all."""
        values = {**self.head, "seconds": round(time.monotonic() - self.began, 1), STAGE_ROWS: self.rows}
        with atomic_file(self.folder / ACCEPTANCE_FILE) as unfinished:
            unfinished.write_text(json.dumps(values, indent=1), encoding="utf-8")

    def say(self, what: str) -> None:
        """On the terminal and in the log."""
        print(what, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{time.monotonic() - self.began:8.1f} s  {what}\n")

    def begin(self, name: str, seconds: float) -> None:
        """The row of a stage that runs from now on; it is replaced when the stage has ended."""
        self.rows.append(stage_row(name, RUNNING, 0.0, {}))
        self.write()
        self.say(f"{name}: for {seconds:.0f} s at most")

    def end(self, name: str, ended: str, seconds: float, found: dict[str, Any], more: Mapping[str, Any]) -> None:
        """``more``: who failed and how, and where the ranks were."""
        if self.rows and self.rows[-1]["ended"] == RUNNING:
            self.rows.pop()
        self.rows.append(stage_row(name, ended, seconds, found) | dict(more))
        self.head[DEVICE] = self.head[DEVICE] or found.get(DEVICE)
        self.write()
        for line in stage_lines(self.rows[-1]):
            self.say(line)

    @property
    def code(self) -> int:
        """The exit code."""
        return 0 if self.well else 1

    def close(self) -> None:
        """The verdict, and all stages in a table."""
        self.head[VERDICT] = WELL if self.well else NOT_WELL
        self.write()
        table = plain_table("stage", "ended", "s", "what it found", right=("s",), breaks=("what it found",))
        for one in self.rows:
            style = "" if one["ended"] == OK else "bold red"
            table.add_row(one[NAME], one["ended"], f"{one['seconds']:.1f}", one[FOUND].get(SAID, ""), style=style)
        new_console().print(table)
        self.say(f"verdict: {self.head[VERDICT]}; wrote {self.folder / ACCEPTANCE_FILE}")


def stage_row(name: str, ended: str, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    return {NAME: name, "ended": ended, "seconds": round(seconds, 2), FOUND: found}


def stage_lines(one: Mapping[str, Any]) -> list[str]:
    """A stage in a line, and below it what is wrong."""
    lines = [f"{one[NAME]}: {one['ended']} in {one['seconds']:.1f} s. {one[FOUND].get(SAID, '')}".rstrip()]
    lines += [f"  {fault}" for fault in one[FOUND].get(FAULTS, [])]
    lines += [f"  rank {failure['rank']}: {failure['error']}" for failure in one.get("failures", [])]
    lines += [f"  ranks {ranks} were at: {where}" for where, ranks in one.get("where", {}).items()]
    return lines
