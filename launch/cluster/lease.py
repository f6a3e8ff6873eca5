"""The lease of a run's directory: one job at a time writes there (torch-free).

[Note: stale] The holder's host, process and the process's start stand in the lease. On that host it is known at once
whether the process is still there: another may have its number, none its start too. From elsewhere it is seen by the
file's time, which the holder renews: it is old beside that of a file made now (one clock, the file system's, tells
both), or it does not change while we wait. What its launcher started again elsewhere takes its lease over at once.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from ...documents import exactly, read_json
from ...errors import CinemeshError

LEASE = "lease.json"  # in the run's directory
BEAT_S = 10.0  # from one renewal to the next
STALE_S = 60.0  # not renewed for so long, it is nobody's: six renewals, each may be late by a slow file system
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
def leased(directory: Path) -> Iterator[None]:
    """Hold the lease of a directory, which is made as needed; it is given back when all is done.

    Raises CinemeshError where another job holds it.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path, mine, over = directory / LEASE, Holder.here(), Event()
    _take(path, mine)
    beat = Thread(target=_renew, args=(path, mine, over), name="lease", daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        if _is(path, mine):
            path.unlink(missing_ok=True)
        if made and not any(directory.iterdir()):
            directory.rmdir()


def _take(path: Path, mine: Holder) -> None:
    while not _created(path, mine):
        holder = _holder(path)
        if holder is None and not path.exists():
            continue  # given back meanwhile
        if not _ended(path, holder, mine):
            raise CinemeshError(
                f"{path.parent} is in use by {holder or 'a job that does not say which'}",
                remedy="end that job, or name another logging.directory",
            )
        if _taken_over(path, holder, mine):
            print(f"the lease of {path.parent} is taken over: {holder or 'its job'} has ended", file=sys.stderr)
            return


def _created(path: Path, mine: Holder) -> bool:
    """Whether the lease is mine now: written whole under another name, then given its own, where there is none."""
    part = path.with_name(f".{LEASE}.{mine.token}")
    part.write_text(json.dumps(asdict(mine), indent=1), encoding="utf-8")
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        try:  # a file system without links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return True


def _ended(path: Path, holder: Holder | None, mine: Holder) -> bool:
    """Whether the holder is no more: see [Note: stale]. May wait for a renewal, and says so."""
    if holder is not None and (holder.host, holder.boot) == (mine.host, mine.boot) and holder.boot:
        return not holder.is_alive()
    if holder is not None and holder.job and holder.job == mine.job:
        return True
    first, until = _renewed(path), time.monotonic() + STALE_S
    if first is not None and _now(path, mine) - first <= STALE_S:
        print(f"{path} is of {holder or 'another job'}: waiting up to {STALE_S:.0f} s to see whether it is renewed",
              file=sys.stderr)  # fmt: skip
        while _renewed(path) == first and time.monotonic() < until:
            time.sleep(POLL_S)
    return _renewed(path) in (first, None)


def _taken_over(path: Path, holder: Holder | None, mine: Holder) -> bool:
    """Put mine in place of a stale lease. Who else found it stale waits, and looks again."""
    turn = path.with_name(f".{LEASE}.turn")
    try:
        os.close(os.open(turn, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(POLL_S)
        if (since := _renewed(turn)) is not None and _now(path, mine) - since > STALE_S:
            turn.unlink(missing_ok=True)  # of one that was killed in its turn
        return False
    try:
        if _holder(path) != holder:
            return False
        part = path.with_name(f".{LEASE}.{mine.token}")
        part.write_text(json.dumps(asdict(mine), indent=1), encoding="utf-8")
        part.replace(path)
        return True
    finally:
        turn.unlink(missing_ok=True)


def _renew(path: Path, mine: Holder, over: Event) -> None:
    while not over.wait(BEAT_S):
        try:
            if _is(path, mine):
                os.utime(path)
        except OSError:  # of a file system that is away for a while: it is tried again
            continue


def _is(path: Path, mine: Holder) -> bool:
    return _holder(path) == mine


def _holder(path: Path) -> Holder | None:
    """None for a file that is away, or none of ours."""
    try:
        found = read_json(path, "the lease", "")
        return Holder(**exactly(found, "the lease", _KINDS, remedy=""))
    except CinemeshError:
        return None


_KINDS = {"host": str, "boot": str, "pid": int, "start": str, "began": str, "job": str, "token": str}


def _renewed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _now(path: Path, mine: Holder) -> float:
    """By the clock that gave the lease its time."""
    probe = path.with_name(f".{LEASE}.{mine.token}.now")
    probe.touch()
    try:
        return probe.stat().st_mtime
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
