"""Every rank's first process: it starts one process for each job, watches it, and tells the other ranks how it ended.

These processes make no group and touch no GPU: they speak through the job's store alone, so that nothing that happens
in a stage stops them. Rank 0 leads: it gives an order for each job, with the seconds that it has, and the last one. A
rank that fails ends the job on all, since the others would wait for it; at the deadline whatever still runs is killed,
and the next stage begins in new processes.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from ...documents import parse_json, read_json
from ...errors import CinemeshError
from ..cluster.environment import processes_here
from ..cluster.meeting import job_store
from ..health.groups import by_value
from .child import END_S, Child
from .here import FAULTS, AcceptanceOptions, Here, at_key
from .report import FAILED, LATE, LOST, NOT_BEGUN, OK, WRONG, AcceptanceReport
from .stages import AcceptanceStage, StageJob

BOARD = "cinemesh/acceptance"  # what supervisors and their jobs have of the store
LEAST_S = 5.0  # of a stage: with less it is not begun
LEFTOVER_S = 1.0  # what ranks get to end by themselves once one of them failed
POLL_S = 0.05  # from one question to the store to the next, of up to MANY ranks; of more in proportion
MANY = 256
SHOWN = 8  # failures that are written, the first ones by rank
KILLED, STUCK = "killed", "stuck"  # by its supervisor, since another rank had failed; not even so


@dataclass(frozen=True)
class StageOrder:
    """What rank 0 has all do next. ``code``: the exit code, of the last order."""

    stage: str = ""
    job: int = 0
    seconds: float = 0.0
    code: int | None = None


@dataclass(frozen=True)
class End:
    """How a job ended on one rank. ``signal``: that killed it. ``tail``: of what it printed, or its stacks."""

    rank: int
    how: str
    signal: int | None = None
    error: str = ""
    tail: str = ""


class Rank:
    """One rank's supervisor. ``files``: where its processes print, and rank 0's note what they find."""

    def __init__(self, asked: AcceptanceOptions, stages: Sequence[AcceptanceStage], files: Path) -> None:
        self.store, self.rank, self.world = job_store()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)  # its processes find a store, and hold none
        self.asked, self.stages, self.files = asked, {stage.name: stage for stage in stages}, files
        self.poll_s = POLL_S * max(1.0, self.world / MANY)
        self.output = files / f"rank{self.rank}.log"
        self.number = 0  # of the orders
        self.child: Child | None = None

    def board(self, number: int) -> Store:
        """That of one order."""
        return PrefixStore(f"{BOARD}/{number}", self.store)

    def found(self, stage: str) -> Path:
        return self.files / f"{stage}.json"

    def follow(self) -> int:
        """Do as rank 0 says, to the end; the exit code. Raises CinemeshError where it says nothing any more."""
        while True:
            board = self.board(self.number)
            try:
                board.wait(["order"], timedelta(seconds=self.asked.seconds + 3 * END_S))
            except RuntimeError as error:
                raise CinemeshError(
                    f"rank {self.rank} hears no more from rank 0", remedy="see what ended it"
                ) from error
            order = StageOrder(**parse_json(board.get("order").decode(), "an order", ""))
            if order.code is not None:
                self.store.add(f"{BOARD}/heard", 1)
                return order.code
            self.obey(order)

    def give(self, order: StageOrder) -> None:
        self.board(self.number).set("order", json.dumps(asdict(order)))

    def see_off(self) -> None:
        """Rank 0 may hold the store: it leaves when the others have heard the last order, or had time to."""
        until = time.monotonic() + END_S
        while self.store.add(f"{BOARD}/heard", 0) < self.world - 1 and time.monotonic() < until:
            time.sleep(self.poll_s)

    def obey(self, order: StageOrder) -> End:
        """Run a job on this rank, and tell how it ended."""
        board, job = self.board(self.number), self.stages[order.stage].jobs[order.job]
        work = partial(_work, self.asked, f"{BOARD}/{self.number}", job, order.seconds, self.found(order.stage))
        until = time.monotonic() + order.seconds
        self.number += 1
        self.child = Child(work, order.seconds, self.output, self.files)
        end = self._watched(self.child, board, until)
        self.child = None
        board.set(f"end/{self.rank}", json.dumps(asdict(end)))
        board.add("ended", 1)
        return end

    def _watched(self, child: Child, board: Store, until: float) -> End:
        why, leave = LATE, until
        while (code := child.code(self.poll_s)) is None:
            if why == LATE and board.check(["failed"]):
                why, leave = KILLED, min(until, time.monotonic() + LEFTOVER_S)
            if time.monotonic() > leave:
                if not child.kill():
                    return End(self.rank, STUCK, None, "its process cannot be killed", child.tail())
                return End(self.rank, why, tail=child.stacks() if why == LATE else "")
        if code == 0:
            return End(self.rank, OK)
        board.add("failed", 1)
        error = child.error() or (f"was killed by signal {-code}" if code < 0 else f"ended with code {code}")
        return End(self.rank, FAILED, -code if code < 0 else None, error, child.tail())

    def ends(self, number: int, until: float) -> list[End | None]:
        """Of an order, how it ended on every rank; None of those that do not answer."""
        board = self.board(number)
        while board.add("ended", 0) < self.world and time.monotonic() < until:
            time.sleep(self.poll_s)
        keys = [f"end/{rank}" for rank in range(self.world)]
        texts = [board.get(key).decode() if board.check([key]) else None for key in keys]
        return [None if text is None else End(**parse_json(text, "how a job ended", "")) for text in texts]

    def places(self, number: int) -> dict[str, str]:
        """Where the ranks were last, and which."""
        board = self.board(number)
        keys = {rank: at_key(rank) for rank in range(self.world)}
        where = {rank: board.get(key).decode() if board.check([key]) else "starting" for rank, key in keys.items()}
        return by_value(where)


def _work(asked: AcceptanceOptions, within: str, job: StageJob, seconds: float, file: Path) -> None:
    """In the job's own process."""
    job.work(Here.of(asked, within, seconds, file))


@contextmanager
def supervised(asked: AcceptanceOptions, stages: Sequence[AcceptanceStage]) -> Iterator[Rank]:
    """This process as a rank's supervisor; whatever ends it, its job's process ends too."""
    with tempfile.TemporaryDirectory(prefix="cinemesh-") as files:
        rank = Rank(asked, stages, Path(files))
        try:
            yield rank
        finally:
            if rank.child is not None:
                rank.child.kill()


def run(asked: AcceptanceOptions, stages: Sequence[AcceptanceStage]) -> int:
    """Every stage in turn, on this rank; the exit code, on all ranks that of rank 0."""
    with supervised(asked, stages) as rank:
        return lead(rank, stages) if rank.rank == 0 else rank.follow()


# -- rank 0 -----------------------------------------------------------------------------------------------------------


def lead(rank: Rank, stages: Sequence[AcceptanceStage]) -> int:
    """Give the orders, and write what comes of them; the exit code."""
    asked = rank.asked
    report = AcceptanceReport.begun(asked.out, rank.world, processes_here(rank.world), asked.seconds)
    rank.output = report.log
    scale, due = asked.seconds / sum(stage.share for stage in stages), report.began
    try:
        for stage in stages:
            due += scale * stage.share
            left = min(due - time.monotonic(), 2 * scale * stage.share)
            if left < min(LEAST_S, 0.5 * scale * stage.share):
                report.end(stage.name, NOT_BEGUN, 0.0, {}, {})
            elif not lead_stage(rank, report, stage, left):
                break
    finally:  # also where a signal ends this
        report.close()
        with suppress(RuntimeError):  # the store may be gone
            rank.give(StageOrder(code=report.code))
            rank.see_off()
    return report.code


def lead_stage(rank: Rank, report: AcceptanceReport, stage: AcceptanceStage, seconds: float) -> bool:
    """One stage to its end; whether another can follow."""
    begun = time.monotonic()
    until = begun + seconds
    report.begin(stage.name, seconds)
    ended, more = OK, {}
    for number, job in enumerate(stage.jobs):
        place, order = rank.number, StageOrder(stage.name, number, max(0.1, until - time.monotonic()))
        rank.give(order)
        rank.obey(order)
        ends = rank.ends(place, until + END_S + 1.0)
        ended = _how(ends, job)
        if ended != OK:
            more = {"job": number, "failures": _failures(ends), "where": rank.places(place)}
            break
    file = rank.found(stage.name)
    found = read_json(file, "the findings", "") if file.exists() else {}
    if ended == OK and found.get(FAULTS):
        ended = WRONG
    report.end(stage.name, ended, time.monotonic() - begun, found, more)
    return ended != LOST


def _how(ends: Sequence[End | None], job: StageJob) -> str:
    """A job's end, from those of all ranks."""
    known = [end for end in ends if end is not None]
    if len(known) < len(ends) or any(end.how == STUCK for end in known):
        return LOST
    if job.dies and any(end.how == FAILED and end.signal == signal.SIGKILL for end in known):
        return OK
    if job.dies and all(end.how == OK for end in known):
        return FAILED  # nobody died
    for how in (FAILED, LATE):
        if any(end.how == how for end in known):
            return how
    return OK


def _failures(ends: Sequence[End | None]) -> list[dict[str, Any]]:
    """The first ranks that did not end well by themselves, as the file has them."""
    wrong = [asdict(end) if end else asdict(End(rank, LOST, error="does not answer")) for rank, end in enumerate(ends)]
    return [end for end in wrong if end["how"] not in (OK, KILLED)][:SHOWN]
