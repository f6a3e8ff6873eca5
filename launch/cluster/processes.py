"""Processes: starting local ranks, joining them into one job, and ending them: one message for one failure.

``--nproc N`` starts N ranks through torchrun's own elastic launcher; on a cluster torchrun itself starts them. Either
way a rank finds the others through the environment that the launcher set, and runs inside :func:`rank_main`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing.spawn import start_processes

from ...errors import CinemeshError, in_a_line
from ...parallel.ir.plan import Plan
from ...parallel.runtime.comm import barrier, set_up_nccl
from ...parallel.runtime.mesh import Mesh

USER_ERROR = 2  # exit code of a CinemeshError, see cli.py
BUG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # ask a run to save and stop
GRACE_S = 120  # what ranks get to save once the launcher was asked to stop
MEETING_S = 600.0  # how long ranks wait for one another when they start
ANSWER_S = 1800.0  # and in a collective
_CLAIM = "cinemesh/first_failure"

T = TypeVar("T")

_store: Store | None = None  # of this rank's job; outlives the process group, for the claim of a failure


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # the shell's convention


# -- the environment of a launcher ------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun, or a launcher that speaks its environment, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size(nproc: int | None) -> int:
    """Processes of this job. Raises CinemeshError for ``--nproc`` under torchrun."""
    if launched():
        if nproc is not None:
            raise CinemeshError(
                f"--nproc {nproc} inside a job of {os.environ['WORLD_SIZE']} processes: torchrun has started the "
                "processes already",
                remedy="leave --nproc out",
            )
        return int(os.environ["WORLD_SIZE"])
    return nproc or 1


# -- one rank ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """Where a rank runs; ``mesh`` is None in a job of one process."""

    rank: int
    device: str
    mesh: Mesh | None


@contextmanager
def joined(plan: Plan) -> Iterator[Joined]:
    """This process as a rank of its job: threads, device, process group and mesh.

    One process a GPU where there are as many GPUs as local processes (NCCL), else CPU (gloo). Raises CinemeshError when
    the world size is not the plan's, and when the ranks cannot meet.
    """
    global _store
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= local
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if not launched():
        plan.check_world_size(1)
        yield Joined(0, device, None)
        return
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=timedelta(seconds=MEETING_S))))
    except (dist.DistError, ValueError) as error:
        raise CinemeshError(
            f"rank {os.environ['RANK']} cannot meet the others at {meeting}: {in_a_line(error, lines=1)}",
            remedy="choose another MASTER_PORT, or end the job that holds it",
        ) from error
    plan.check_world_size(world)
    _store = store
    if cuda:
        set_up_nccl()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",  # host-side votes go through gloo
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=ANSWER_S),
    )
    mesh = Mesh(plan, ANSWER_S)
    yield Joined(rank, device, mesh)
    mesh.close()  # after a failure the groups may hang: the process ends anyway
    dist.destroy_process_group()


def rank_main(work: Callable[[], None]) -> int:
    """Run ``work`` on this rank; the exit code. Of a failing job, the first rank to fail speaks, and only that one.

    All ranks that fail end with its code: the launcher reports whichever process it finds ended first, and that may be
    one that failed because the first did.
    """
    try:
        work()
    except Stopped as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(stop, file=sys.stderr)
        return stop.exit_code
    except CinemeshError as error:
        return _failed(USER_ERROR, f"error: {error}")
    except Exception:  # noqa: BLE001  a bug: shown whole, once; the others fail because this one did
        return _failed(BUG, f"[rank {os.environ.get('RANK', '0')}] {traceback.format_exc()}")
    return 0


def _failed(code: int, message: str) -> int:
    """The exit code of the first rank to fail; if that is this one, it speaks."""
    if _store is None:  # before the ranks met, all fail alike
        speaks, code_of_all = int(os.environ.get("LOCAL_RANK", "0")) == 0, code
    else:
        mine = f"{os.environ.get('RANK', '0')} {code}"
        try:
            claimed = _store.compare_set(_CLAIM, "", mine).decode()
        except dist.DistError:  # the store's host is gone: nobody can tell
            claimed = mine
        speaks, code_of_all = claimed == mine, int(claimed.split()[1])
    if speaks:
        print(message, file=sys.stderr)
    return code_of_all


class StopSignal:
    """Notes SIGTERM and SIGINT inside a ``with`` block, to be obeyed between steps."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum


# -- many local ranks -------------------------------------------------------------------------------------------------


def launch(nproc: int, work: Callable[..., None], *args: object) -> int:
    """Run ``work(*args)`` as ranks 0 to ``nproc`` - 1 on this machine; the exit code of the first that failed, or 0.

    ``work`` is a module-level function and its arguments are picklable: processes are spawned. Ranks meet at
    ``MASTER_PORT`` if that is set, else at a free port. Raises CinemeshError for a port in use and for a rank that was
    killed from outside.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # ranks report for themselves, see rank_main
            logging.getLogger(name).setLevel(logging.CRITICAL)
    port = _free_port(os.environ.get("MASTER_PORT"))
    _over_loopback()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=GRACE_S,
    )
    try:
        elastic_launch(config, _rank)(work, *args)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise CinemeshError(
                f"rank {rank} was killed by {name}",
                remedy="if that was the system running out of memory, use a smaller batch "
                "or more recompute. Start the run again to go on from its last checkpoint",
            ) from None
        return failure.exitcode
    except SignalException as stopped:  # the ranks have saved meanwhile
        return 128 + stopped.sigval
    return 0


def forked(ranks: int, work: Callable[[], T]) -> list[T]:
    """What ``work`` answers on every rank of a gloo job of forked processes: no port, and torch is loaded once.

    Not for a process that has begun to use CUDA. Answers are pickled.
    """
    _over_loopback()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_forked, (ranks, Path(folder), work), ranks, start_method="fork")
        return [pickle.loads((Path(folder) / f"answer{rank}").read_bytes()) for rank in range(ranks)]


def _forked(rank: int, ranks: int, folder: Path, work: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "store"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks)
    (folder / f"answer{rank}").write_bytes(pickle.dumps(work()))
    barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()


def _over_loopback() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def _rank(work: Callable[..., None], *args: object) -> None:
    sys.exit(rank_main(lambda: work(*args)))


def _free_port(wanted: str | None) -> int:
    """``wanted`` if nobody listens there, or 0, for any: the launcher picks one. Raises CinemeshError when in use."""
    if wanted is None:
        return 0
    if not wanted.isdigit() or not 0 < int(wanted) < 1 << 16:
        raise CinemeshError(f"MASTER_PORT is {wanted!r}", remedy="a port is a number from 1 to 65535")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store will: no wait for old links
        try:
            listener.bind(("127.0.0.1", int(wanted)))
        except OSError as error:
            raise CinemeshError(
                f"port {wanted} (MASTER_PORT) is in use: {error.strerror}",
                remedy="choose another, or unset MASTER_PORT for a free one",
            ) from error
    return int(wanted)
