"""Where the wall seconds of a run went, over all of its starts: steps that count, and what was lost, by cause.

``goodput.json`` beside the run holds the account. A start that finds one lost the time since its last report, and the
steps since the checkpoint that it goes on from, which are taken again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from ...documents import read_json
from ...files import atomic_file
from ...ranges import MOST_STEPS, integers, reals
from ...reading import read_record

GOODPUT_FILE = "goodput.json"
REMEDY = "remove it, and the account of this run begins anew"
Spent = Annotated[float, reals(0.0, 1e12, "no run lasts longer", "s")]


class LossCause(StrEnum):
    """What wall seconds were lost to."""

    DOWN = "down"  # from the last report before to this start
    START = "start"  # building, resuming, capturing
    REDONE = "redone"  # steps since the checkpoint that a start went on from
    LOADING = "loading"  # samples that a step waited for
    VALIDATION = "validation"
    SAMPLING = "sampling"  # clips while training goes on
    CHECKPOINT = "checkpoint"  # what training waited for one
    SKIPPED = "skipped"  # steps whose update was skipped
    OTHER = "other"  # the rest: reports, votes, what nobody timed


@dataclass(frozen=True, kw_only=True)
class SavedAccount:
    """As the file has it. ``begun``, ``until``: seconds since the epoch. ``first``, ``step``: of the last start."""

    begun: Spent
    until: Spent
    step: Annotated[int, integers(0, MOST_STEPS, "no run has more", "steps")]
    steps: Annotated[int, integers(0, MOST_STEPS, "no run has more", "steps")]  # that count
    useful_s: float | None
    lost_s: dict[str, float]


@dataclass
class GoodputAccount:
    """Of one run, from a start on. ``steps`` of ``useful_s`` seconds count."""

    path: Path
    begun: float
    step: int
    steps: int = 0
    useful_s: float = 0.0
    lost_s: dict[LossCause, float] = field(default_factory=lambda: dict.fromkeys(LossCause, 0.0))

    @classmethod
    def of(cls, directory: Path, first: int, since: float) -> GoodputAccount:
        """That of a run's folder, gone on with from step ``first``; this start began at ``since``, of the epoch.

        Raises CinemeshError for a file that is none.
        """
        path = directory / GOODPUT_FILE
        if not path.exists():
            return cls(path, since, first)
        saved = read_record(SavedAccount, read_json(path, "the account of goodput", REMEDY), f"the account {path}")
        account = cls(path, saved.begun, first, saved.steps, saved.useful_s or 0.0)
        account.lost_s |= {cause: saved.lost_s.get(cause, 0.0) for cause in LossCause}
        account.lost_s[LossCause.DOWN] += max(0.0, since - saved.until)
        again = min(max(0, saved.step - first), account.steps)
        if again:  # at the mean of those that counted
            seconds = account.useful_s * again / account.steps
            account.steps, account.useful_s = account.steps - again, account.useful_s - seconds
            account.lost_s[LossCause.REDONE] += seconds
        return account

    def lose(self, cause: LossCause, seconds: float) -> None:
        self.lost_s[cause] += seconds

    @contextmanager
    def losing(self, cause: LossCause) -> Iterator[None]:
        """What runs inside is lost to this cause."""
        since = time.monotonic()
        try:
            yield
        finally:
            self.lose(cause, time.monotonic() - since)

    def add_step(self, seconds: float, *, counts: bool) -> None:
        """One more step, without its loading."""
        self.step += 1
        if counts:
            self.steps += 1
            self.useful_s += seconds
        else:
            self.lose(LossCause.SKIPPED, seconds)

    def settle(self, now: float) -> float:
        """Put all that nobody timed down to ``OTHER``; the goodput up to ``now``, of the epoch."""
        wall = max(now - self.begun, 1e-9)
        known = self.useful_s + sum(seconds for cause, seconds in self.lost_s.items() if cause is not LossCause.OTHER)
        self.lost_s[LossCause.OTHER] = max(0.0, wall - known)
        return min(1.0, self.useful_s / wall)

    def write(self, now: float) -> None:
        """The file, whole or not at all."""
        lost = {str(cause): seconds for cause, seconds in self.lost_s.items() if seconds > 0.0}
        saved = SavedAccount(
            begun=self.begun, until=now, step=self.step, steps=self.steps, useful_s=self.useful_s or None, lost_s=lost
        )
        with atomic_file(self.path) as unfinished:
            unfinished.write_text(json.dumps(asdict(saved)) + "\n", encoding="utf-8")
