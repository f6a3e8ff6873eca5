"""A watchdog process beside each rank: what stops the rank, or holds Python's lock for ever, cannot silence it.

The rank writes where it stands into shared memory (``marks.py``); the process beside it reads that. It is forked before
the rank has a process group or CUDA, and talks to the others' over a connection of its own to the store.

When a rank makes no progress for longer than ``TIMES`` the longest turn of what it does, at least ``LEAST_S``, its
watchdog calls all others to say where their ranks stand; one of them judges (``verdict.py``), has the stack of the
guilty rank shown, writes and prints what it found, and only then every watchdog ends its rank. When a rank ends without
a word, its watchdog says so.

When a rank loses its connections, or ends, there is a roll call first (``roll_call.py``): a machine that is lost takes
its watchdogs along, and what its ranks' peers say of that, or die of, is no cause.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from socket import gethostname
from typing import BinaryIO, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from ...documents import parse_json
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import count_host_calls
from ...parallel.runtime.mesh import group_ranks
from .flight import BUFFER, CommunicatorState, FlightRecorder, joined_flights
from .marks import Doing, Marks, Standing
from .meeting import FIRST_FAILURE, Meeting
from .roll_call import DEATH, DEATH_S, RollCall, wait_for
from .rounds import keep
from .verdict import At, RoundEnd, Waypoint, judged, lost_with_machines, shown_place, store_lost

POLL_S = 0.5
MANY = 1024  # watchdogs that ask the store at each poll; more do less often, 6,144 every 3 s
LEAST_S = 60.0  # below, goodput changes by 0.02 points (a failure in 8 h), and a slow file system is taken for a hang
TIMES = 10.0  # the longest turn so far: of a step, of loading, of a checkpoint
WRITE_S = 600.0  # at least, where a checkpoint is waited for: what writes it works behind training, and may be late
FIRST_S = 1800.0  # where there was none yet: compilation, the first read of a cold cache
ANSWERS_S = 5.0  # what the other watchdogs get to say where their ranks stand
HEARD_S = 3.0  # what they get to hear why all end, before rank 0 does, which may hold the store
STACK_S = 2.0  # what a rank gets to write its stack
SHOW_STACK = signal.SIGUSR2
CALLED = "watchdog/called"
VERDICT = "watchdog/verdict"
JOB_VERDICT = "cinemesh/verdict"  # of any round: for a launcher that has but one
_BYE, _LOST = "bye", "lost"
FOUND_S = 2 * ANSWERS_S + STACK_S + DEATH_S  # in which a roll call is over, whoever calls it
_WRITES = (Doing.PUBLISHING, Doing.SAVING)


@dataclass
class Watched:
    """What a rank has of its watchdog. ``directory``: where the ends of rounds are kept."""

    marks: Marks
    directory: Path
    pipe: Connection
    pid: int
    stack: BinaryIO
    recorder: FlightRecorder
    programs: Sequence[Sequence[Waypoint]] = ()

    def tell(self, plan: Plan, programs: Sequence[Sequence[Waypoint]]) -> None:
        """What runs, by which a place is told."""
        self.programs = programs
        self.recorder.listen()
        with suppress(OSError):  # it is gone: the rank goes on without it
            self.pipe.send_bytes(pickle.dumps((plan, programs)))

    def cause(self) -> str | None:
        """Why this rank fails, if that is another's death; nothing where that was said; None: nothing is known."""
        with suppress(OSError, EOFError):  # it is gone
            self.pipe.send_bytes(pickle.dumps(_LOST))
            if self.pipe.poll(FOUND_S):
                return pickle.loads(self.pipe.recv_bytes())  # nosec B301  of its own watchdog
        return None

    def failed(self, error: Exception, text: str) -> None:
        """Keep why the rank ends: for the next round."""
        place = self.marks.place
        where = f"{type(error).__name__} in {shown_place(place, self.programs)}"
        keep(self.directory, RoundEnd((), place.step, where, text))

    def close(self) -> None:
        """The rank ends, and has said why if that is no good end."""
        with suppress(OSError):  # it is gone
            self.pipe.send_bytes(pickle.dumps(_BYE))
            until = time.monotonic() + ANSWERS_S
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > until:  # it waits for a store that is gone
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.01)
        self.pipe.close()
        faulthandler.unregister(SHOW_STACK)
        self.stack.close()
        self.recorder.close()


def watched(meeting: Meeting, directory: Path) -> Watched:
    """Start the watchdog of this rank: before it has a process group, or memory that a network card knows."""
    marks = Marks()
    count_host_calls(marks.host_calls)
    ours, theirs = cast(tuple[Connection, Connection], Pipe())
    stack: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  of both processes, as long as they live
    recorder = FlightRecorder.made()
    faulthandler.register(SHOW_STACK, stack)
    rank_pid = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: none is needed there
        pid = os.fork()
    if pid:
        theirs.close()
        return Watched(marks, directory, ours, pid, stack, recorder)
    try:
        ours.close()
        for number in (signal.SIGINT, signal.SIGTERM):  # the rank's, of the terminal or the launcher; Ctrl-Z is for all
            signal.signal(number, signal.SIG_IGN)
        _Watchdog(meeting, marks, directory, theirs, rank_pid, stack, recorder).run()
    except Exception:  # noqa: BLE001  the rank goes on without it
        traceback.print_exc()
    finally:
        os._exit(0)


@dataclass
class _Watchdog:
    """The process beside a rank."""

    meeting: Meeting
    marks: Marks
    directory: Path
    pipe: Connection
    rank_pid: int
    stack: BinaryIO
    recorder: FlightRecorder | None = None
    plan: Plan | None = None
    programs: Sequence[Sequence[Waypoint]] = ()
    roll: RollCall = field(init=False)
    rank_waits: bool = False  # to hear why it fails
    job_failed: bool = False  # and who failed first has said so: the launcher ends the others

    def run(self) -> None:
        """Until the rank has said goodbye, has ended, or is ended."""
        self.meeting = self.meeting.again()
        self.roll = RollCall.begin(self.meeting)
        try:
            self._watch(self.meeting.store)
        except dist.DistError:
            self._without_store()

    def _watch(self, store: Store) -> None:
        """See ``run``. Raises DistError when the store is gone."""
        rank, roll = self.meeting.rank, self.roll
        place, since = self.marks.place, time.monotonic()
        looked, asks, called = since, since, False
        while True:
            if self.pipe.poll(POLL_S) and not self._heard(store):
                return
            now, here = time.monotonic(), self.marks.place
            if now - looked > 10 * POLL_S:  # this process was asleep, with the machine perhaps
                since = now
            looked = now
            if here != place:
                place, since = here, now
            limit_s = self._limit_s(place)
            if not called and (now - since > limit_s or (now >= asks and store.check([CALLED]))):
                called = True
                self._called(store, now - since, limit_s)
            if now >= asks:
                asks = now + POLL_S * self.meeting.world / MANY
                self.job_failed = self.job_failed or store.check([FIRST_FAILURE])
                roll.answer()
            if called and store.check([_show(rank)]) and not store.check([_shown(rank)]):
                store.set(_shown(rank), self._stack())
            if (called or roll.answered) and self._hears_verdict(store):
                self._end_rank()
                return

    def _limit_s(self, place: Standing) -> float:
        known_s, least_s = self.marks.longest_s(place.phase), WRITE_S if place.phase in _WRITES else LEAST_S
        return max(least_s, TIMES * known_s) if known_s and not place.first else FIRST_S

    def _heard(self, store: Store) -> bool:
        """Whether the rank lives on."""
        try:
            said = pickle.loads(self.pipe.recv_bytes())  # nosec B301  of its own rank
        except (EOFError, OSError):
            first = store.add("watchdog/deaths", 1) == 1  # those that die of this death come later
            if not self._lost_machines(store) and first:
                end = self._death()
                keep(self.directory, end)
                store.set(DEATH, end.text)
            return False
        if said == _BYE:
            self._say_where(store, replace(self._at(0.0), place=self.marks.place._replace(phase=Doing.ENDED)))
            self.roll.here()
            return False
        if said == _LOST:
            self.rank_waits = True
            self._answer("" if self._lost_machines(store) else self.roll.death())
        else:
            self.plan, self.programs = said
        return True

    def _answer(self, cause: str | None) -> None:
        with suppress(OSError):  # the rank has ended
            self.pipe.send_bytes(pickle.dumps(cause))

    def _death(self) -> RoundEnd:
        rank, place = self.meeting.rank, self.marks.place
        where = f"ended without a word in {shown_place(place, self.programs)}"
        return RoundEnd((rank,), place.step, where, f"rank {rank} (process {self.rank_pid} on {gethostname()}) {where}")

    def _lost_machines(self, store: Store) -> bool:
        """Call the roll, once in a round: whether ranks are lost with their watchdogs. That is said, and all end."""
        roll = self.roll
        if self._hears_verdict(store):  # by which ranks end
            return True
        if roll.calls():
            lost = roll.lost(ANSWERS_S + POLL_S * self.meeting.world / MANY)
            if lost and not store.check([VERDICT]):
                self._tell(store, lost_with_machines(lost, roll.machines(lost), self.marks.place, self.programs))
            roll.over()
        roll.wait(FOUND_S)
        return self._hears_verdict(store)

    def _hears_verdict(self, store: Store) -> bool:
        """Whether there is one. Rank 0 goes last: with it may go the store, and who has not heard would blame that."""
        if not store.check([VERDICT]):
            return False
        store.set(_heard(self.meeting.rank), "")
        if self.meeting.rank == 0:
            wait_for(store, [_heard(rank) for rank in self.roll.present()], HEARD_S)
        return True

    def _without_store(self) -> None:
        """The store's host is gone: one watchdog says so when its rank fails by that, or stands still."""
        place, since = self.marks.place, time.monotonic()
        while not self.rank_waits and time.monotonic() - since < self._limit_s(place):
            try:
                if self.pipe.poll(POLL_S):
                    said = pickle.loads(self.pipe.recv_bytes())  # nosec B301  of its own rank
                    if said == _BYE:
                        return
                    self.rank_waits = said == _LOST
            except (EOFError, OSError):
                if self.job_failed:
                    return
                if self.roll.one_machine:  # its own death took the store along
                    self._say(self._death())
                    return
                break
            if (here := self.marks.place) != place:
                place, since = here, time.monotonic()
        if self.roll.deputy:
            self._say(store_lost(self.roll.store_held_by, place, self.programs))
        self._answer("")
        if not self.rank_waits:
            self._end_rank()

    def _end_rank(self) -> None:
        """Which may have ended since: its launcher ends it when another does."""
        with suppress(ProcessLookupError):
            os.kill(self.rank_pid, signal.SIGKILL)

    def _at(self, silent_s: float) -> At:
        return At(self.marks.place, silent_s, _is_stopped(self.rank_pid), gethostname(), self.rank_pid)

    def _say_where(self, store: Store, at: At) -> None:
        store.set(f"watchdog/at/{self.meeting.rank}", json.dumps(asdict(at)))

    def _called(self, store: Store, silent_s: float, limit_s: float) -> None:
        """Say where the rank stands; who called first judges."""
        self._say_where(store, self._at(silent_s))
        self._say_flight(store)
        if silent_s <= limit_s or store.add("watchdog/judges", 1) > 1:
            return
        store.set(CALLED, "")
        ranks, plan = self._answers(store), self.plan

        def group(axes: Axes, rank: int) -> Sequence[int]:
            return () if plan is None else group_ranks(plan, axes, rank)

        machines = self.roll.machines([rank for rank, at in ranks.items() if at is None])
        verdict = judged(ranks, self.programs, group, limit_s, machines)
        if (stack := self._stack_of(verdict.guilty[0], store)) and (inside := _innermost(stack)):
            verdict = replace(verdict, text=f"{verdict.text}; rank {verdict.guilty[0]} is in {inside}")
        if plan is not None and (flights := joined_flights(self._flights(store), plan)):
            verdict = replace(verdict, text=f"{verdict.text}; {flights}")
        self._tell(store, verdict, stack)

    def _say_flight(self, store: Store) -> None:
        """What the rank's flight recorder knows, where it has one and the rank is not stopped."""
        if self.recorder is not None and int(os.environ.get(BUFFER, "0") or 0) > 0 and not _is_stopped(self.rank_pid):
            store.set(f"watchdog/flight/{self.meeting.rank}", json.dumps(self.recorder.ask(STACK_S)))

    def _flights(self, store: Store) -> dict[int, dict[str, CommunicatorState]]:
        keys = {rank: f"watchdog/flight/{rank}" for rank in range(self.meeting.world)}
        known = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
        said = {rank: parse_json(text, "where collectives stand", "") for rank, text in known.items()}
        return {rank: {name: CommunicatorState(*of) for name, of in each.items()} for rank, each in said.items()}

    def _tell(self, store: Store, verdict: RoundEnd, stack: str = "") -> None:
        """To people, to the next round, and to all watchdogs, who end their ranks."""
        self._say(verdict, stack)
        self.meeting.job.set(JOB_VERDICT, verdict.text)
        store.set(VERDICT, verdict.text)

    def _say(self, verdict: RoundEnd, stack: str = "") -> None:
        keep(self.directory, verdict, stack)
        print(f"error: {verdict.text}", file=sys.stderr, flush=True)

    def _answers(self, store: Store) -> dict[int, At | None]:
        keys = [f"watchdog/at/{rank}" for rank in range(self.meeting.world)]
        wait_for(store, keys, ANSWERS_S)
        return {rank: _at(store.get(key).decode()) if store.check([key]) else None for rank, key in enumerate(keys)}

    def _stack_of(self, rank: int, store: Store) -> str:
        """Where each thread of a rank is in Python; nothing where it does not answer."""
        if rank == self.meeting.rank:
            return self._stack()
        store.set(_show(rank), "")
        return store.get(_shown(rank)).decode() if wait_for(store, [_shown(rank)], STACK_S + 2 * POLL_S) else ""

    def _stack(self) -> str:
        """Nothing of a process that is stopped."""
        with suppress(ProcessLookupError):
            os.kill(self.rank_pid, SHOW_STACK)
        until, size = time.monotonic() + STACK_S, -1
        while time.monotonic() < until and (size <= 0 or size != os.fstat(self.stack.fileno()).st_size):
            size = os.fstat(self.stack.fileno()).st_size
            time.sleep(POLL_S / 2)  # a busy machine may halt it between two lines
        self.stack.seek(0)
        return self.stack.read().decode(errors="replace")


def _heard(rank: int) -> str:
    return f"watchdog/heard/{rank}"


def _show(rank: int) -> str:
    return f"watchdog/show/{rank}"


def _shown(rank: int) -> str:
    return f"watchdog/shown/{rank}"


def _innermost(stack: str) -> str:
    """Of the main thread, which faulthandler writes last: the function, and where it stands in which file."""
    found = re.findall(r'\n  File "([^"]*)", line (\d+) in (\S+)', stack.rpartition("hread 0x")[2])
    return f"{found[0][2]} ({Path(found[0][0]).name}:{found[0][1]})" if found else ""


def _at(text: str) -> At:
    found = parse_json(text, "where a rank stands", "")
    step, phase, *counts = found["place"]
    return replace(At(**found), place=Standing(step, Doing(phase), *counts))


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in "Tt"
