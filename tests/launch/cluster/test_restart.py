"""A job under torchrun that loses a rank, or hangs: one message names which and where, and it goes on to the same bits.

Two gloo processes. Where a rank stands, who is told to end and what is kept of a round are tested without a job.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import threading
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import pytest
from elastic_job import Fault, run_job
from elastic_nodes import lose_and_regain
from planted_faults import HANGS_IN_A_PROGRAM, HANGS_IN_SHORT, check_hangs, check_kills, kills, long_recipe
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster import marks as marks_file
from cinemesh.launch.cluster import sidecar
from cinemesh.launch.cluster.marks import NO_PROGRAM, Doing, Marks, Standing
from cinemesh.launch.cluster.meeting import Meeting
from cinemesh.launch.cluster.rounds import ROUNDS_FILE, begin_round, keep
from cinemesh.launch.cluster.sidecar import DEATH, watched
from cinemesh.launch.cluster.verdict import RoundEnd, Waypoint
from cinemesh.parallel.ir.plan import Plan


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_job_goes_on_to_the_same_bits(clips: Path, tmp_path: Path) -> None:
    """Under plain torchrun: its next round met the addresses of the dead in the store, and never recovered."""
    whole, killed = (long_recipe(clips, tmp_path / name, 8) for name in ("whole", "killed"))
    done = run_job(tmp_path / "whole", whole, [])
    assert done.code == 0, done.told
    done = run_job(tmp_path / "killed", killed, [Fault(1, "kill", "record", 4, "attention")], torchrun=True)
    check_kills(done, killed, whole)
    step, name = done.fired[0]["step"], done.fired[0]["doing"]
    said = rf"rank 1 \(process \d+ on .*\) ended without a word in step {step}, {re.escape(name)}attention\)"
    ((_, line),) = done.errors
    assert re.fullmatch(f"error: {said}", line), line
    lines = [line for _, line in done.out]
    again = next(number for number, line in enumerate(lines) if re.fullmatch(f"the round before ended: {said}", line))
    assert "resumed from" in lines[again + 1] and not any("resumed" in line for line in lines[:again])
    rows = [json.loads(line) for line in (tmp_path / "killed/run" / ROUNDS_FILE).read_text().splitlines()]
    assert [row.get("guilty") for row in rows] == [None, [1], None]


@pytest.mark.slow
def test_hangs_are_named_with_rank_and_op_and_the_job_goes_on(clips: Path, tmp_path: Path) -> None:
    """One a life: stopped, before a collective, with Python's lock held, in a checkpoint's thread."""
    check_hangs(run_job(tmp_path / "job", long_recipe(clips, tmp_path, 20), HANGS_IN_SHORT), HANGS_IN_SHORT)


@pytest.mark.slow
def test_hangs_are_named_where_the_program_alone_tells_how_far_it_is(clips: Path, tmp_path: Path) -> None:
    """As in a CUDA Graph's replay. In compute, at an issue, in waits, in the update; asleep and stopped."""
    values = long_recipe(clips, tmp_path, 12) | {"marks": "on"}
    rows = check_hangs(run_job(tmp_path / "job", values, HANGS_IN_A_PROGRAM), HANGS_IN_A_PROGRAM)
    behind = [" or behind it, up to " in row["said"].partition("; ")[0] for row in rows]
    assert all(behind) and " and waits for rank" in "".join(row["said"] for row in rows)


@pytest.mark.slow
def test_eight_kills_at_random_moments_change_no_bit(clips: Path, tmp_path: Path) -> None:
    """Of either rank, in each kind of place; a hundred are a benchmark."""
    whole, killed = (long_recipe(clips, tmp_path / name, 24) for name in ("whole", "killed"))
    assert run_job(tmp_path / "whole", whole, []).code == 0
    found = check_kills(run_job(tmp_path / "killed", killed, kills(8, seed=1)), killed, whole)
    assert found["fired"] >= 7  # a moment may come when all is done


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_a_job_goes_on_with_the_ranks_that_are_left_and_with_those_that_come_back(clips: Path, tmp_path: Path) -> None:
    """4, 2 and 4 ranks in one life of the job: planned again each time, and the losses are those of one rank alone."""
    plans, losses, alone = lose_and_regain(clips, tmp_path / "job", nodes=2)
    assert [re.findall(r"= (\d+) processes", plan) for plan in plans] == [["4"], ["2"], ["4"]]
    assert losses.keys() == alone.keys() == set(range(1, 15))
    assert max(abs(losses[step] / alone[step] - 1) for step in alone) < 1e-10


# -- what is kept of rounds -------------------------------------------------------------------------------------------


def verdict(rank: int = 1, step: int = 5, where: str = "step 6, at a (matmul)") -> RoundEnd:
    return RoundEnd((rank,), step, where, f"rank {rank} stands in {where}")


def test_a_round_is_told_how_the_one_before_ended(tmp_path: Path) -> None:
    """Only that: a round that ended well leaves no word, nor does one before it."""
    assert begin_round(tmp_path) is None
    keep(tmp_path, verdict())
    assert begin_round(tmp_path) == "rank 1 stands in step 6, at a (matmul)"
    assert begin_round(tmp_path) is None


@pytest.mark.parametrize(
    ("other", "refused"),
    [
        (verdict(), True),
        (verdict(rank=2), False),
        (verdict(step=7), False),
        (verdict(where="step 6, at b (matmul)"), False),
    ],
)
def test_a_run_that_ends_twice_alike_is_not_begun_a_third_time(other: RoundEnd, refused: bool, tmp_path: Path) -> None:
    """A batch that kills its rank would do so until the budget of restarts is spent."""
    begin_round(tmp_path)
    keep(tmp_path, verdict())
    keep(tmp_path, verdict())  # of the same round: two watchdogs tell of one end
    begin_round(tmp_path)
    keep(tmp_path, other)
    if not refused:
        assert begin_round(tmp_path) == other.text
        return
    for _ in range(2):  # it stays so
        with pytest.raises(
            CinemeshError, match=r"ended alike, in step 6: rank 1 stands in .*; mend that; remove .*rounds"
        ):
            begin_round(tmp_path)
    (tmp_path / ROUNDS_FILE).unlink()
    assert begin_round(tmp_path) is None


def test_nothing_is_kept_where_no_round_follows(tmp_path: Path) -> None:
    """Ranks that a person started here by ``--nproc``: nobody starts them again."""
    keep(tmp_path, verdict())
    assert not list(tmp_path.iterdir())


def test_half_a_line_of_one_who_was_killed_is_passed_over(tmp_path: Path) -> None:
    begin_round(tmp_path)
    keep(tmp_path, verdict())
    with (tmp_path / ROUNDS_FILE).open("a") as file:
        file.write('{"step": 5, "gui\n[]\n')
    assert begin_round(tmp_path) == verdict().text
    assert begin_round(tmp_path) is None


# -- marks ------------------------------------------------------------------------------------------------------------


def test_a_place_is_the_record_that_is_not_done_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of earlier programs are counted; the longest turn of each phase is kept: the limit follows from it."""
    now_ns = iter([0, 0, 2_000_000_000, 5_000_000_000, 6_000_000_000])
    monkeypatch.setattr(marks_file.time, "monotonic_ns", lambda: next(now_ns))
    marks = Marks()
    assert marks.place == Standing(0, Doing.STARTING, 0) and marks.longest_s(Doing.STEP) == 0
    marks.at(3, Doing.STEP)
    marks.run(1, 9)
    assert marks.place == Standing(3, Doing.STEP, 1, True, 1, 0, 0)
    marks.record_done(7)
    marks.host_calls[0] += 1
    assert marks.place == Standing(3, Doing.STEP, 1, True, 1, 8, 0, 1)
    marks.at(3, Doing.REPORTING)
    assert marks.place == Standing(3, Doing.REPORTING, 2, False, 1, 8, 0, 1) and marks.longest_s(Doing.STEP) == 2.0
    marks.at(4, Doing.STEP)
    marks.run(NO_PROGRAM, 0)
    assert marks.place == Standing(4, Doing.STEP, 3, False, NO_PROGRAM, 0, 9, 1)
    marks.at(5, Doing.STEP)
    marks.run(1, 9)
    assert not marks.place.first
    assert (marks.longest_s(Doing.STEP), marks.longest_s(Doing.REPORTING)) == (2.0, 3.0)


# -- the process beside a rank ----------------------------------------------------------------------------------------


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    """Of a job of one rank, at a store of this process."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return Meeting(store, "a round", 0, 1)


@pytest.mark.parametrize("word", [True, False])
def test_a_rank_that_ends_without_a_word_is_told_of(word: bool, meeting: Meeting, tmp_path: Path) -> None:
    """By where it stood; one that says goodbye is not. A real process, which sees its pipe close."""
    begin_round(tmp_path)
    found = watched(meeting, tmp_path)
    found.tell(Plan(), [[Waypoint("a", "matmul", (), None), Waypoint("b", "swiglu", (), None)]])
    found.marks.at(2, Doing.STEP)
    found.marks.run(0, 2)
    found.marks.record_done(0)
    if not word:
        found.pipe.close()
        os.waitpid(found.pid, 0)
    found.close()
    found.close()  # by the work of a rank, and by what ran it
    assert meeting.store.check([DEATH]) != word
    if not word:
        said = f"rank 0 (process {os.getpid()} on {socket.gethostname()}) ended without a word in step 3, at b (swiglu)"
        assert meeting.store.get(DEATH).decode() == said
    assert len((tmp_path / ROUNDS_FILE).read_text().splitlines()) == (1 if word else 2)


def test_the_limit_follows_from_what_was_measured(meeting: Meeting, tmp_path: Path) -> None:
    """Ten turns, at least a minute; longer where a checkpoint is waited for, or nothing is known."""
    marks = Marks()
    watchdog = sidecar._Watchdog(meeting, marks, tmp_path, cast(Any, Pipe()[0]), 1, cast(Any, None))
    limits: list[dict[Doing, float]] = []
    for measured_s in (0.0, 1.0, 20.0, 90.0):
        for doing in Doing:
            marks._words[marks_file._WORDS + doing] = int(measured_s * 1e9)
        limits.append({doing: watchdog._limit_s(Standing(3, doing, 7)) for doing in Doing})
        assert watchdog._limit_s(Standing(3, Doing.STEP, 7, first=True)) == 1800, "kernels are compiled, of this bucket"
    assert [limit[Doing.STEP] for limit in limits] == [1800, 60, 200, 900]
    assert [limit[Doing.SAVING] for limit in limits] == [1800, 600, 600, 900]


def test_the_stack_of_a_rank_ends_in_what_its_main_thread_does(meeting: Meeting, tmp_path: Path) -> None:
    """Written by the rank itself when it is asked; of one that is stopped there is none, and nobody waits long."""
    stack = (tmp_path / "stack").open("w+b")
    pid = os.fork()
    if not pid:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        faulthandler.register(sidecar.SHOW_STACK, stack)
        _rest(meeting.again())
    try:
        meeting.job.get("there")
        watchdog = sidecar._Watchdog(meeting, Marks(), tmp_path, cast(Any, None), pid, stack)
        shown = watchdog._stack()
        assert shown.count("hread 0x") == 2 and sidecar._innermost(shown).startswith("_rest (test_restart.py:")
        os.kill(pid, signal.SIGSTOP)
        stack.truncate(0)
        assert watchdog._stack() == "" and sidecar._innermost("") == ""
        watchdog._end_rank()
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        watchdog._end_rank()  # its launcher may have been sooner
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    stack.close()


def _rest(meeting: Meeting) -> None:
    meeting.job.set("there", "")
    time.sleep(60)
