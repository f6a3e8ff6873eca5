"""One pool of gloo workers for a whole test run: `pool.run(world_size, function, *args)`.

Starting processes costs far more than the small jobs that tests give them, so the workers are
started once and every job gets a fresh process group. They are forked from a server that has loaded
torch and nothing else, never from the process of the tests: its threads would be missing in them,
and its garbage (a video decoder that joins its threads when it is freed) would be theirs to collect.
Functions are sent by name: a job must be a module-level function, and its arguments and results
must be picklable. Workers keep the warning filters of the process that started them.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

MAX_RANKS = 8
TIMEOUT_S = 120.0  # of one job
GRACE_S = 10.0  # what the other ranks get to answer once one rank has failed


class WorkerError(Exception):
    """A rank raised, died or did not answer; the message holds every rank's traceback, the first to fail first."""


@dataclass(frozen=True)
class _Job:
    """What a worker needs to find and run a function; ``arguments`` stay pickled until its module is loaded."""

    module: str
    path: str
    function: str
    arguments: bytes
    world_size: int
    store: str
    timeout_s: float


def _module(name: str, path: str) -> ModuleType:
    """The module of a job: loaded from its file under the same name, once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forget_meshes() -> None:
    """Empty DTensor's caches; a job that uses DTensor calls this first.

    They find a mesh by its shape and hand back the mesh of an earlier job, whose group names by now belong to nobody
    or, worse, to another axis.
    """
    for candidate in gc.get_objects():
        if type(candidate) is functools._lru_cache_wrapper and candidate.__module__.startswith("torch.distributed."):
            candidate.cache_clear()
    from torch.distributed.tensor import debug

    debug._clear_fast_path_sharding_prop_cache()


def _run_job(rank: int, job: _Job) -> tuple[bool, Any]:
    """(True, result) or (False, traceback). The group is gone afterwards, so that a failed rank frees its peers."""
    import torch.distributed as dist

    try:
        function: Any = _module(job.module, job.path)
        for part in job.function.split("."):
            function = getattr(function, part)
        timeout = timedelta(seconds=job.timeout_s)
        store = dist.FileStore(job.store, job.world_size)  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=timeout)
        return True, function(*pickle.loads(job.arguments))
    except BaseException:  # noqa: BLE001  whatever a job raises belongs to the test that sent it
        return False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _serve(pipe: Connection, rank: int, filters: Sequence[Any]) -> None:
    import torch

    warnings.filters[:] = filters  # pyright: ignore[reportIndexIssue]  a list, whatever its stub says
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    while True:
        try:
            job: _Job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        answer = _run_job(rank, job)
        try:
            # Plain pickle copies tensors; the pipe's own pickler would pass them by shared file
            # descriptors.
            message = pickle.dumps(answer)
        except Exception:  # noqa: BLE001  pickle raises what it likes
            message = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(message)


class Pool:
    """Up to ``MAX_RANKS`` workers. A pool that was killed after a timeout starts again with the next job."""

    def __init__(self) -> None:
        self._folder = Path()  # of the stores through which a job's ranks find each other
        self._jobs = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._start()

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gloo-pool-"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["cinemesh.model.runner"])  # once there instead of in every worker
        for rank in range(MAX_RANKS):
            ours, theirs = cast(tuple[Connection, Connection], Pipe())
            process = context.Process(target=_serve, args=(theirs, rank, list(warnings.filters)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Any]:
        """Call ``function(*args)`` on ranks 0..world_size-1 of a fresh gloo group; the results, by rank.

        Raises WorkerError when a rank raises (the pool lives on) or does not answer in time (the
        pool is killed).
        """
        assert 1 <= world_size <= MAX_RANKS, f"{world_size} ranks: the pool has {MAX_RANKS}"
        if not self._processes:
            self._start()
        self._jobs += 1
        job = _Job(
            module=function.__module__,
            path=function.__code__.co_filename,
            function=function.__qualname__,
            arguments=pickle.dumps(args),
            world_size=world_size,
            store=str(self._folder / f"job{self._jobs}"),
            timeout_s=timeout_s,
        )
        for pipe in self._pipes[:world_size]:
            pipe.send_bytes(pickle.dumps(job))
        return self._collect(function.__qualname__, world_size, timeout_s)

    def _collect(self, name: str, world_size: int, timeout_s: float) -> list[Any]:
        waiting = {self._pipes[rank]: rank for rank in range(world_size)}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        start = time.monotonic()
        deadline = start + timeout_s
        while waiting and (ready := wait(list(waiting), deadline - time.monotonic())):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    succeeded, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, answer = False, "the worker died"
                if succeeded:
                    results[rank] = answer
                    continue
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                failures[rank] = answer
        if waiting:
            self.close()
            silent = ", ".join(str(rank) for rank in sorted(waiting.values()))
            failures[-1] = f"no answer from ranks {silent} within {time.monotonic() - start:.0f} s; the pool was killed"
        elif any(not process.is_alive() for process in self._processes):
            self.close()
        if failures:
            lines = (f"[rank {r}] {t}" if r >= 0 else t for r, t in failures.items())
            raise WorkerError(f"{name} on {world_size} ranks:\n" + "\n".join(lines))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Kill the workers; also after a test run, since idle workers hold nothing worth a clean end."""
        if not self._processes:
            return
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes.clear()
        self._pipes.clear()
        shutil.rmtree(self._folder)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's worker pool."""
    workers = Pool()
    yield workers
    workers.close()
