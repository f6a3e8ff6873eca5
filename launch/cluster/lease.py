"""The lease of a place where a run writes: one job at a time (torch-free).

[Note: stale] The holder's host, process and the process's start stand in the lease. On that host it is known at once
whether the process is still there: another may have its number, none its start too. From elsewhere it is seen by the
beat, a file beside the lease that its holder writes again and again: it is old beside a file made now (one clock, the
store's, tells both), or it does not change while we wait. What its launcher started again elsewhere takes its lease
over at once. The lease itself is never written twice, so that a holder who was asleep writes over nobody's.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from ...documents import exactly, parse_json
from ...errors import CinemeshError
from ..storage.places import Location, children, create_file, make_folder, modified, put_file, read_file
from ..storage.remote import RemotePath

LEASE = "lease.json"  # in the run's directory
BEAT_S = 10.0  # from one beat to the next
STALE_S = 60.0  # without a beat for so long, it is nobody's: six of them, each may be late by a slow file system
POLL_S = 1.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """A process. ``start``: of it, in the kernel's ticks since ``boot``; ``job``: by its launcher, empty if unknown."""

    host: str
    boot: str
    pid: int
    start: str
    began: str
    job: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        began = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), _boot(), os.getpid(), _start(os.getpid()), began, _job(), uuid.uuid4().hex)

    def is_alive(self) -> bool:
        """On its host, since its boot: whether the process is still there."""
        return _start(self.pid) == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, there since {self.began}"


@contextmanager
def leased(place: Location) -> Iterator[None]:
    """Hold the lease of a folder, which is made as needed; it is given back when all is done.

    Raises CinemeshError where another job holds it. Of a store where two may hold it at once, that is said.
    """
    if isinstance(place, RemotePath) and not place.is_conditional:
        print(f"WARNING: {place}: what reaches it looks before it writes, in two requests, so that two jobs that start "
              "there at one moment may both go on; see to it that there is one", file=sys.stderr)  # fmt: skip
    made = not place.exists()
    path, mine, over = place / LEASE, Holder.here(), Event()
    try:
        make_folder(place)
        _take(path, mine)
    except OSError as error:
        raise CinemeshError(
            f"cannot write {path}: {error.strerror or error}", remedy="see to its folder and the free space there"
        ) from error
    beat = Thread(target=_beat, args=(path, mine, over), name="lease", daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        if _is(path, mine):
            path.unlink(missing_ok=True)
        beats(path, mine).unlink(missing_ok=True)
        if made and isinstance(place, Path) and not children(place):
            place.rmdir()


def beats(path: Location, holder: Holder | None) -> Location:
    """What the holder of a lease writes again and again; of one that does not say who it is, the lease itself."""
    return path if holder is None else path.parent / f".{LEASE}.{holder.token}"


def _take(path: Location, mine: Holder) -> None:
    put_file(beats(path, mine), b"")
    try:
        while not create_file(path, _text(mine)):
            holder = _holder(path)
            if holder is None and not path.exists():
                continue  # given back meanwhile
            if not _ended(path, holder, mine):
                raise CinemeshError(
                    f"{path.parent} is in use by {holder or 'a job that does not say which'}",
                    remedy="end that job, or write to another place (logging.directory, logging.checkpoints)",
                )
            if _taken_over(path, holder, mine):
                print(f"the lease of {path.parent} is taken over: {holder or 'its job'} has ended", file=sys.stderr)
                return
    except BaseException:
        with suppress(OSError, CinemeshError):
            beats(path, mine).unlink(missing_ok=True)
        raise


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _ended(path: Location, holder: Holder | None, mine: Holder) -> bool:
    """Whether the holder is no more: see [Note: stale]. May wait for a beat, and says so."""
    if holder is not None and (holder.host, holder.boot) == (mine.host, mine.boot) and holder.boot:
        return not holder.is_alive()
    if holder is not None and holder.job and holder.job == mine.job:
        return True
    first, until = _renewed(path, holder), time.monotonic() + STALE_S
    if first is not None and _now(path, mine) - first <= STALE_S:
        print(f"{path} is of {holder or 'another job'}: waiting up to {STALE_S:.0f} s to see whether it is renewed",
              file=sys.stderr)  # fmt: skip
        while _renewed(path, holder) == first and time.monotonic() < until:
            time.sleep(POLL_S)
    return _renewed(path, holder) in (first, None)


def _taken_over(path: Location, holder: Holder | None, mine: Holder) -> bool:
    """Put mine in place of a stale lease. Who else found it stale waits, and looks again."""
    turn = path.parent / f".{LEASE}.turn"
    if not create_file(turn, mine.token.encode()):
        time.sleep(POLL_S)
        if (since := modified(turn)) is not None and _now(path, mine) - since > STALE_S:
            turn.unlink(missing_ok=True)  # of one that was killed in its turn
        return False
    try:
        if _holder(path) != holder:
            return False
        put_file(path, _text(mine))
        if holder is not None:
            beats(path, holder).unlink(missing_ok=True)
        return True
    finally:
        turn.unlink(missing_ok=True)


def _beat(path: Location, mine: Holder, over: Event) -> None:
    while not over.wait(BEAT_S):
        with suppress(OSError, CinemeshError):  # of a store that is away for a while: it is tried again
            put_file(beats(path, mine), b"")


def _renewed(path: Location, holder: Holder | None) -> float | None:
    """When the lease was taken, or its holder's last beat."""
    times = [modified(path), modified(beats(path, holder))]
    return max((at for at in times if at is not None), default=None)


def _is(path: Location, mine: Holder) -> bool:
    return _holder(path) == mine


def _holder(path: Location) -> Holder | None:
    """None for a file that is away, or none of ours."""
    try:
        found = parse_json(read_file(path).decode(), "the lease", "")
        return Holder(**exactly(found, "the lease", _KINDS, remedy=""))
    except (OSError, ValueError, CinemeshError):
        return None


_KINDS = {"host": str, "boot": str, "pid": int, "start": str, "began": str, "job": str, "token": str}


def _now(path: Location, mine: Holder) -> float:
    """By the clock that gave the beat its time."""
    probe = path.parent / f".{LEASE}.{mine.token}.now"
    put_file(probe, b"")
    try:
        return modified(probe) or 0.0
    finally:
        probe.unlink(missing_ok=True)


def _boot() -> str:
    return BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""


def _start(pid: int) -> str:
    """Of a process, in ticks since the machine's; empty where there is no such process, or it is a dead one's rest."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _job() -> str:
    """By the launcher that would start it again under this name, and no second one beside it."""
    known = os.environ
    if "SLURM_JOB_ID" in known:
        return f"slurm {known['SLURM_JOB_ID']} {known.get('SLURM_STEP_ID', '')}"
    run = known.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run == "none" else f"torchrun {run}"
