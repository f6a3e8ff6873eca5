"""Triton's kernels of a stage compiled by many processes at once, into its cache on disk, before anything is timed.

One kernel takes 1 to 20 s on one core: in turn, they would take the time of the stage. Each process launches its share
once, as it will be launched later. Whatever fails here fails there again, where it is told.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from benchmarks.on_card.stage import Here
from benchmarks.pretended_cuda import pretended

MOST_PROCESSES = 12  # each has a CUDA context of half a GB, and tensors of its kernel
T = TypeVar("T")

_held = ExitStack()  # of a process of the pool: CUDA stays pretended for as long as it lives


def compile_all(launch: Callable[[T, str], object], tasks: Sequence[T], here: Here, most_s: float) -> float:
    """``launch(task, place)`` of every task, in processes of their own, for at most ``most_s``; the seconds taken.

    ``launch`` is a function of a module.
    """
    begun = time.monotonic()
    processes = 1 if here.smoke else min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(tasks))
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _begin, (here.smoke,)) as pool, contextlib.suppress(multiprocessing.TimeoutError):
        asked = pool.starmap_async(_attempt, [(launch, task, here.place) for task in tasks], chunksize=1)
        asked.get(min(most_s, here.left_s))
    return round(time.monotonic() - begun, 1)


def _begin(smoke: bool) -> None:
    if smoke:
        _held.enter_context(pretended())


def _attempt(launch: Callable[[T, str], object], task: T, place: str) -> None:
    import torch

    with contextlib.suppress(Exception):
        launch(task, place)
        torch.cuda.synchronize()
