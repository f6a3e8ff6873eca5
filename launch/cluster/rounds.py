"""What is kept of a run's rounds: how each ended, so that the next one says it first, and does not end so for ever.

``rounds.jsonl`` in the directory of the run: a line when a round begins, and one for what ended it, if that is known.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...documents import parse_json
from ...errors import CinemeshError
from .verdict import RoundEnd

ROUNDS_FILE = "rounds.jsonl"


def begin_round(directory: Path) -> str | None:
    """A round of the run begins: how the one before it ended, where that is known.

    Raises CinemeshError when the last two ended in the same step, in the same place: a third would.
    """
    before, last = ([None, None, *_ends(directory)])[-2:]
    if before is not None and last is not None and _alike(before, last):
        raise CinemeshError(
            f"the last two rounds of this run ended alike, in step {last['step'] + 1}: {last['text']}",
            remedy=f"mend that; remove {directory / ROUNDS_FILE} to try again",
        )
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory, {"began": time.strftime("%Y-%m-%d %H:%M:%S %z")})
    return None if last is None else str(last["text"])


def keep(directory: Path, end: RoundEnd, stack: str = "") -> None:
    """Why the round ended; ``stack``: of the guilty rank. Nothing is kept where no round was begun: none follows."""
    row = {"step": end.step, "guilty": list(end.guilty), "where": end.where, "text": end.text, "stack": stack}
    if (directory / ROUNDS_FILE).exists():
        with suppress(OSError):  # a full disk: what is told is told all the same
            _write(directory, row)


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("step", "guilty", "where"))


def _ends(directory: Path) -> list[dict[str, Any] | None]:
    """Of every round, what was first told of its end."""
    ends: list[dict[str, Any] | None] = []
    for row in _rows(directory):
        if "began" in row:
            ends.append(None)
        elif ends and {"step", "text"} <= row.keys():
            ends[-1] = ends[-1] or row
    return ends


def _rows(directory: Path) -> list[dict[str, Any]]:
    path = directory / ROUNDS_FILE
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line, str(path), "")
        except CinemeshError:  # half a line: whoever wrote it was killed
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _write(directory: Path, row: dict[str, Any]) -> None:
    with (directory / ROUNDS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
