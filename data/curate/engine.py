"""Who computes: this process, a pool of processes on this machine, or Ray Data on a cluster; with the same functions.

A unit's values are equal wherever it is computed: one thread each.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Self

from ...errors import CinemeshError, did_you_mean
from .measure import WorkUnit

ENGINES = ("processes", "ray")
MOST_WAITING = 4  # units a worker that are handed out, so that a pool holds few rows at a time


def check_engine(name: str) -> None:
    """Raises CinemeshError for an unknown one, and for Ray where it is not installed."""
    if name not in ENGINES:
        raise CinemeshError(f"--engine {name!r:.100} is unknown", remedy=did_you_mean(name, ENGINES))
    if name == "ray":
        try:
            import ray.data  # noqa: F401  # the import is the question
        except ImportError as error:
            raise CinemeshError(
                "--engine ray needs the package ray, which is not installed", remedy="pip install 'cinemesh[ray]'"
            ) from error


class Engine:
    """Used as a context: what it started ends with it."""

    def __init__(self, name: str, workers: int) -> None:
        check_engine(name)
        self._name, self._workers = name, workers
        self._pool: ProcessPoolExecutor | None = None
        self._ray: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._ray is not None:
            self._ray.shutdown()

    def compute(self, units: Sequence[WorkUnit]) -> Iterator[str]:
        """Run the units; gives the path of each as it is done. Raises what a unit raises."""
        if not units:
            return
        if self._name == "ray":
            yield from self._on_ray(units)
        elif self._workers == 1:
            with one_thread():
                for unit in units:
                    yield unit.run()
        else:
            yield from self._in_pool(units)

    def _in_pool(self, units: Sequence[WorkUnit]) -> Iterator[str]:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # torch and OpenMP do not survive a fork
            self._pool = ProcessPoolExecutor(self._workers, mp_context=spawn)
        waiting = iter(units)
        try:
            handed = {self._pool.submit(run_unit, each) for each in islice(waiting, MOST_WAITING * self._workers)}
            while handed:
                done, handed = wait(handed, return_when=FIRST_COMPLETED)
                for each in done:
                    yield each.result()
                handed |= {self._pool.submit(run_unit, each) for each in islice(waiting, len(done))}
        except BrokenProcessPool as error:
            raise CinemeshError(
                "a process that measured ended on its own, most often because memory ran out",
                remedy="run the same command again with fewer --workers: what is measured stays",
            ) from error

    def _on_ray(self, units: Sequence[WorkUnit]) -> Iterator[str]:
        import ray

        if not ray.is_initialized():  # a cluster's address stands in RAY_ADDRESS; without one, Ray runs here
            here: dict[str, Any] = {"num_cpus": self._workers, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if "RAY_ADDRESS" in os.environ else here))
            self._ray = ray
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        for row in rows.map(_run_row).iter_rows():
            yield row["path"]


def run_unit(unit: WorkUnit) -> str:
    """In a process of its own, with one thread."""
    with one_thread():
        return unit.run()


def _run_row(row: dict[str, WorkUnit]) -> dict[str, str]:
    return {"path": run_unit(row["unit"])}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums have one order then, whatever the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        import cv2

        cv2.setNumThreads(1)
    except ImportError:  # nothing that is on needs it
        pass
    try:
        yield
    finally:
        torch.set_num_threads(before)
