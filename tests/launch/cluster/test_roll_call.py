"""A machine that is lost whole: its ranks and the watchdogs beside them. One message names them, and nobody else.

Real watchdogs beside processes of this machine, two on each of three "nodes".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cinemesh.launch.cluster import processes, sidecar
from cinemesh.launch.cluster.marks import Doing, Marks
from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.roll_call import RollCall
from cinemesh.launch.cluster.rounds import ROUNDS_FILE, begin_round
from cinemesh.launch.cluster.sidecar import watched
from cinemesh.launch.cluster.verdict import Waypoint
from cinemesh.parallel.ir.plan import Plan

NODES, LOCAL = 3, 2
RANKS = NODES * LOCAL
LOST = "connection closed by peer"


def forked(work: Callable[[], None]) -> int:
    """A process that does this work and ends."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)  # with what it forks, one group: what is on one node
    try:
        work()
    finally:
        os._exit(0)


class Job:
    """Ranks that step until their peers are gone, when they raise what gloo does."""

    def __init__(self, folder: Path) -> None:
        begin_round(folder)
        self.folder, self.said = folder, folder / "said"
        self.holder = forked(self._hold)  # as an agent of torchrun's, on node 0
        port = self._wait_for("port")
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.store = TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=60))
        self.pids = [forked(lambda r=rank: self._rank(r)) for rank in range(RANKS)]
        self.store.wait([f"stands/{rank}" for rank in range(RANKS)])
        time.sleep(2 * sidecar.POLL_S)  # what they did last is known to their watchdogs

    def _hold(self) -> None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (self.folder / "port.part").write_text(str(store.port))
        (self.folder / "port.part").rename(self.folder / "port")
        time.sleep(600)

    def _wait_for(self, name: str) -> str:
        until = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        return (self.folder / name).read_text()

    def _rank(self, rank: int) -> None:
        sys.stderr = self.said.open("a", buffering=1)
        node, local = divmod(rank, LOCAL)
        names = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node, "GROUP_WORLD_SIZE": NODES}
        os.environ |= {name: str(value) for name, value in names.items()}
        store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60))
        processes._meeting = Meeting(store, "a round", rank, RANKS)
        found = processes._watched = watched(processes._meeting, self.folder)
        found.tell(Plan(), [[Waypoint("a", "matmul", (), None), Waypoint("b", "swiglu", (), None)]])

        def work() -> None:
            found.marks.at(2, Doing.STEP)
            found.marks.run(0, 2)
            found.marks.record_done(0)
            store.set(f"stands/{rank}", "")
            while not (self.folder / "peers are gone").exists():
                time.sleep(0.02)
            raise RuntimeError(LOST)

        code = processes.rank_main(work)
        (self.folder / f"code{rank}").write_text(str(code))

    def lose(self, *groups: int) -> None:
        """These processes and all that they forked, at once; the others hear of it."""
        for pid in groups:
            os.killpg(pid, signal.SIGKILL)
        (self.folder / "peers are gone").touch()

    def close(self) -> list[str]:
        """What was said of failures, when all have ended."""
        for pid in self.pids:
            os.waitpid(pid, 0)
        os.kill(self.holder, signal.SIGKILL)
        os.waitpid(self.holder, 0)
        return [line for line in self.said.read_text().splitlines() if line]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(sidecar, "ANSWERS_S", 1.5)
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
    return Job(tmp_path)


def ends(job: Job) -> list[dict[str, object]]:
    return [row for line in (job.folder / ROUNDS_FILE).read_text().splitlines() if "text" in (row := json.loads(line))]


def test_a_node_that_is_lost_whole_is_named_once_and_no_innocent_one(job: Job) -> None:
    job.lose(job.pids[4], job.pids[5])
    (line,) = job.close()
    node = f"{os.uname().nodename} (node 2)"
    said = f"ranks 4, 5 of {node} do not answer, nor their watchdogs"
    assert line == f"error: {said}; they were lost in step 3, at b (swiglu)"
    (row,) = ends(job)
    assert row["guilty"] == [4, 5] and row["step"] == 2
    assert not list(job.folder.glob("code[45]"))


def test_the_node_of_the_store_is_named_once(job: Job) -> None:
    """Its agent held it: nobody can ask anybody."""
    job.lose(job.holder, job.pids[0], job.pids[1])
    (line,) = job.close()
    said = "torchrun's agent on 127.0.0.1, which held the store of the job, is gone, or its machine is"
    assert line == f"error: {said}; it was lost in step 3, at b (swiglu)"
    assert [row["guilty"] for row in ends(job)] == [[0]]
    assert all((job.folder / f"code{rank}").read_text() == "1" for rank in range(2, RANKS))


def test_one_rank_that_dies_beside_its_watchdog_is_told_of_by_it(job: Job) -> None:
    """The roll is called, and all watchdogs answer."""
    os.kill(job.pids[3], signal.SIGKILL)
    (job.folder / "peers are gone").touch()
    (line,) = job.close()
    assert line.startswith(f"error: rank 3 (process {job.pids[3]} on ") and "ended without a word in step 3" in line
    assert [row["guilty"] for row in ends(job)] == [[3]]


def test_after_a_verdict_no_roll_is_called(job: Job) -> None:
    """Ranks end by it, one after the other, with their watchdogs."""
    Meeting(job.store, "a round", 0, RANKS).store.set(sidecar.VERDICT, "")
    job.lose(job.pids[4], job.pids[5])
    assert not job.close() and not ends(job)


def test_what_fails_where_all_are_there_is_shown_whole(job: Job) -> None:
    """By one rank: nobody was lost."""
    job.lose()
    lines = job.close()
    assert lines[-1] == f"RuntimeError: {LOST}" and sum(line == lines[-1] for line in lines) == 1
    assert len(ends(job)) == 1 and not ends(job)[0]["guilty"]


@pytest.mark.parametrize("called", [False, True])
def test_rank_0_ends_when_the_others_know_why(called: bool, tmp_path: Path) -> None:
    """With it may go the store: one that had not heard said that rank 0 was gone, which ended as it was told to.

    Those that did not answer the roll are not waited for.
    """
    store, lost = HashStore(), 2
    meeting: Any = SimpleNamespace(rank=0, world=4, store=store)
    watchdog = sidecar._Watchdog(meeting, Marks(), tmp_path, cast(Any, None), 1, cast(Any, None))
    watchdog.roll = RollCall(meeting, "rank 0", deputy=False, one_machine=False)
    assert not watchdog._hears_verdict(store)
    left = [rank for rank in range(meeting.world) if not (called and rank == lost)]
    if called:
        watchdog.roll.calls()
        for rank in left:
            store.set(f"roll/here/{rank}", "")
        assert watchdog.roll.lost(0.2) == [lost]
    store.set(sidecar.VERDICT, "why")
    heard: list[int] = []

    def others() -> None:
        for rank in left[1:]:
            time.sleep(0.2)
            heard.append(rank)
            store.set(f"watchdog/heard/{rank}", "")

    thread = threading.Thread(target=others)
    thread.start()
    assert watchdog._hears_verdict(store)
    assert heard == left[1:]
    thread.join()
