"""Processes: starting local ranks, joining them into one job, and ending them: one message for one failure.

``--nproc N`` starts N ranks of this machine, which meet at a store that listens on loopback alone; on a cluster
torchrun starts them. Either way a rank finds the others through the environment that the launcher set, and runs inside
:func:`rank_main`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import ProcessException, start_processes

from ...errors import CinemeshError
from ...interrupt import WAKE_S, be_deaf, deaf_children, interrupt, interrupt_later
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import barrier, nccl_stack, set_up_nccl
from ...parallel.runtime.mesh import Mesh, start_job
from ..options import Device
from ..terminal import show_what_it_can
from .alike import software_alike
from .environment import check_kernel_cache, claim, cores_each, device_here, launched, processes_here
from .marks import Marks
from .meeting import FIRST_FAILURE, Meeting, agree, meet
from .sidecar import JOB_VERDICT, Watched, watched

USER_ERROR = 2  # exit code of a CinemeshError, see cli.py
BUG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # ask a run to save and stop
GRACE_S = 120.0  # what ranks get to save once the launcher was asked to stop
LEFTOVER_S = 20.0  # and to end by themselves once one of them failed
LOOPBACK = "127.0.0.1"
ANSWER_S = 1800.0  # how long ranks wait for one another in a collective

T = TypeVar("T")

_meeting: Meeting | None = None  # of this rank's round; outlives the process group, for the claim of a failure
_parted = False  # a process that joins again meets again
_watched: Watched | None = None  # of this rank


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # the shell's convention


# -- one rank ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """Where a rank runs; ``mesh``, ``meeting`` and ``watched`` are None in a job of one process.

    ``marks``: where the work of the rank says how far it is.
    """

    rank: int
    device: str
    mesh: Mesh | None
    meeting: Meeting | None = None
    watched: Watched | None = None
    marks: Marks = field(default_factory=Marks)


def meet_alike(about: str, facts: Mapping[str, str]) -> Meeting:
    """The other ranks of this job, met at the first call, once all have the same facts, software and environment.

    Raises CinemeshError, the same on every rank, where they have not, and where the ranks cannot meet.
    """
    global _meeting, _parted
    if _meeting is None or _parted:
        _meeting, _parted = meet(), False
    agree(_meeting, f"{about}, software and environment".removeprefix(", "), software_alike() | {**facts})
    return _meeting


@contextmanager
def joined(
    plan: Plan, wanted: Device, alike: Mapping[str, str] | None = None, watch: Path | None = None
) -> Iterator[Joined]:
    """This process as a rank of its job: threads, device, process group (NCCL on GPUs, gloo on CPUs) and mesh.

    ``alike``: what must be the same on all ranks, beside their software. ``watch``: have a watchdog, which keeps there
    how a round ended. Raises CinemeshError when there is no such device for it, when the world size is not the plan's,
    as :func:`meet_alike`, and when a rank computes where it may not: see :func:`environment.claim`.
    """
    global _parted, _watched
    local = processes_here(1)
    torch.set_num_threads(cores_each(local))
    device = device_here(wanted, local)
    cuda = device != "cpu"
    if not launched():
        if cuda:
            torch.cuda.set_device(device)
        plan.check_world_size(1)
        yield Joined(0, device, None)
        return
    meeting = meet_alike("resolved recipe" if alike else "", alike or {})
    rank = meeting.rank
    plan.check_world_size(meeting.world)
    _watched = watched(meeting, watch) if watch else None
    if cuda:
        torch.cuda.set_device(device)
    claim(meeting.store, rank, device)
    if cuda:
        check_kernel_cache()
        set_up_nccl()
        if rank == 0 and (lost := nccl_stack().told()):
            _to_stderr(f"WARNING: {lost}")
    start_job(plan, device, meeting.store, rank, ANSWER_S)
    mesh = Mesh(plan, ANSWER_S)
    yield Joined(rank, device, mesh, meeting, _watched, _watched.marks if _watched else Marks())
    _parted = True
    mesh.close()  # after a failure the groups may hang: the process ends anyway
    dist.destroy_process_group()


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def rank_main(work: Callable[[], int | None], say: Callable[[str], None] = _to_stderr) -> int:
    """Run ``work`` on this rank; its exit code. Of a failing job, the first rank to fail speaks, and only that one.

    All ranks that fail end with its code: torchrun reports whichever process it finds ended first, and that may be one
    that failed because the first did.
    """
    try:
        return work() or 0
    except Stopped as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(stop, file=sys.stderr)
        return stop.exit_code
    except CinemeshError as error:
        return _failed(error, USER_ERROR, f"error: {error}", say)
    except Exception as error:  # noqa: BLE001  a bug: shown whole, once; the others fail because this one did
        if (known := _known_cause()) is not None:
            return _failed(None, BUG, f"error: {known}", say) if known else BUG
        return _failed(error, BUG, f"[rank {os.environ.get('RANK', '0')}] {traceback.format_exc()}", say)
    finally:
        if _watched is not None:
            _watched.close()


def _known_cause() -> str | None:
    """What the watchdogs know of a failure that may be another rank's: its death; nothing more to say after a verdict.

    None: nothing is known.
    """
    if _watched is None:
        return None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left: not before one has said why
    return _watched.cause()


def _failed(error: Exception | None, code: int, message: str, say: Callable[[str], None]) -> int:
    """The exit code of the first rank to fail; if that is this one, it speaks. ``error``: what a run is to remember."""
    if _meeting is None:  # before the ranks met, all fail alike
        speaks, code_of_all = int(os.environ.get("LOCAL_RANK", "0")) == 0, code
    else:
        mine = f"{os.environ.get('RANK', '0')} {code}"
        try:
            claimed = _meeting.store.compare_set(FIRST_FAILURE, "", mine).decode()
        except dist.DistError:  # the store's host is gone: nobody can tell
            claimed = mine
        speaks, code_of_all = claimed == mine, int(claimed.split()[1])
    if speaks:
        say(message)
        if _watched is not None and error is not None:
            _watched.failed(error, message)
    return code_of_all


class StopSignal:
    """Notes SIGTERM and SIGINT inside a ``with`` block, to be obeyed between steps; a second Ctrl-C is obeyed at once.

    Not by a rank that a launcher started: it may hear one Ctrl-C twice, from the terminal and from the launcher.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT and not launched():
            interrupt(signum, frame)
        self.signum = signum


# -- many local ranks -------------------------------------------------------------------------------------------------


def launch(nproc: int, work: Callable[..., int | None], *args: object) -> int:
    """Run ``work(*args)`` as ranks 0 to ``nproc`` - 1 on this machine; the exit code of the first that failed, or 0.

    ``work`` is a module-level function and its arguments are picklable: processes are spawned. Ranks meet at
    ``MASTER_PORT`` if that is set, else at a free port. SIGTERM and Ctrl-C are passed on as a request to save and stop;
    a second Ctrl-C, and every other way out of here, leaves no rank alive. Raises CinemeshError for a port in use and
    for a rank that was killed from outside.
    """
    _over_loopback()
    context = multiprocessing.get_context("spawn")
    store, said = _store_on_loopback(os.environ.get("MASTER_PORT")), context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, nproc, store.port, said, work, args)) for rank in range(nproc)]
    stop = StopSignal()
    try:
        with deaf_children():
            for process in ranks:
                process.start()
        with stop:
            ended = _watch(ranks, stop)
    finally:
        with interrupt_later():
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
    message = None if said.empty() else said.get()
    lost = {rank: -code for rank, code in ended.items() if code < 0 and code != -signal.SIGTERM}
    if store.check([JOB_VERDICT]):  # the watchdogs ended all ranks, and said why
        return BUG
    for rank, signum in lost.items():  # what the others then say of a lost connection is no cause
        if signum == signal.SIGKILL or message is None:
            raise _killed(rank, signum)
    if message is not None:
        _to_stderr(message)
    elif stop.signum is not None and -signal.SIGTERM in ended.values():
        _to_stderr(f"stopped by {signal.Signals(stop.signum).name}")
    code = next((code for code in ended.values() if code), 0)
    return code if stop.signum is None or code in (0, USER_ERROR, BUG) else 128 + stop.signum


def _watch(ranks: list[SpawnProcess], stop: StopSignal) -> dict[int, int]:
    """Exit codes by rank, in the order in which they ended, without those that were killed here for not ending."""
    ended: dict[int, int] = {}
    deadline, passed_on = float("inf"), False
    while len(ended) < len(ranks):
        alive = {rank: process for rank, process in enumerate(ranks) if rank not in ended}
        wait([process.sentinel for process in alive.values()], timeout=WAKE_S)
        for rank, process in alive.items():
            if process.exitcode is not None:
                ended[rank] = process.exitcode
        now = time.monotonic()
        if stop.signum is not None and not passed_on:
            passed_on, deadline = True, now + GRACE_S
            for process in alive.values():
                process.terminate()
        if not passed_on and any(ended.values()):
            deadline = min(deadline, now + LEFTOVER_S)
        if now > deadline:
            break
    return ended


def _killed(rank: int, signum: int) -> CinemeshError:
    return CinemeshError(
        f"rank {rank} was killed by {signal.Signals(signum).name}",
        remedy="if that was the system running out of memory, use a smaller batch or more recompute. A training run "
        "that is started again goes on from its last checkpoint",
    )


def forked(ranks: int, work: Callable[[], T]) -> list[T]:
    """What ``work`` answers on every rank of a gloo job of forked processes: no port, and torch is loaded once.

    Not for a process that has begun to use CUDA. Answers are pickled. Raises the first CinemeshError of a rank, and
    another for a rank that was killed.
    """
    _over_loopback()
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        try:
            with deaf_children():
                started = start_processes(_forked, (ranks, Path(folder), work), ranks, join=False, start_method="fork")
                assert started is not None
                processes += [process for process in started.processes if process is not None]
            while not started.join(WAKE_S):
                pass
            answers = [_answer(Path(folder), rank) for rank in range(ranks)]
        except ProcessException:  # of the rank that was found first: what it says of a lost connection is no cause
            for rank, process in enumerate(processes):
                if process.exitcode == -signal.SIGKILL:
                    raise _killed(rank, signal.SIGKILL) from None
                if isinstance(error := _answer(Path(folder), rank), CinemeshError):
                    raise error from None
            raise
        finally:
            with interrupt_later():
                for process in processes:
                    process.kill()
                    process.join()
        return answers


def _answer(folder: Path, rank: int) -> Any:
    """What a rank said last, None where nothing: from a folder that this process made, and nobody else may enter."""
    file = folder / f"answer{rank}"
    return pickle.loads(file.read_bytes()) if file.exists() else None  # nosec B301


def _forked(rank: int, ranks: int, folder: Path, work: Callable[[], object]) -> None:
    gc.freeze()  # what the parent left to collect is the parent's: a video decoder would join threads it has not here
    be_deaf()
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "store"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks)
    try:
        answer = work()
    except CinemeshError as error:
        (folder / f"answer{rank}").write_bytes(pickle.dumps(error))
        raise
    (folder / f"answer{rank}").write_bytes(pickle.dumps(answer))
    barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()


def _over_loopback() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def _rank(
    rank: int, nproc: int, port: int, said: SimpleQueue[str], work: Callable[..., int | None], args: Sequence[object]
) -> None:
    be_deaf()
    show_what_it_can()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for: the launcher holds the store
    }
    sys.exit(rank_main(lambda: work(*args), said.put))


def _store_on_loopback(wanted: str | None) -> TCPStore:
    """A store at port ``wanted``, or any; torch by itself would listen on every interface of the machine.

    Raises CinemeshError for a port that is none or in use.
    """
    if wanted is not None and (not wanted.isdigit() or not 0 < int(wanted) < 1 << 16):
        raise CinemeshError(f"MASTER_PORT is {wanted!r}", remedy="a port is a number from 1 to 65535")
    try:
        listener = socket.create_server((LOOPBACK, int(wanted or 0)))
    except OSError as error:
        raise CinemeshError(
            f"port {wanted} (MASTER_PORT) is in use: {error.strerror}",
            remedy="choose another, or unset MASTER_PORT for a free one",
        ) from error
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
