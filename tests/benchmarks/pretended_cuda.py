"""What stands for ``torch.cuda`` where there is no GPU, so that what is written for one runs to its end.

Tensors lie on the CPU, Triton's kernels run under its interpreter, an event is a moment of the host's clock, and a
graph replays by running its executor again. Whatever is called of ``torch.cuda`` is held to the real signature. What it
answers are numbers of no device: nothing that is timed so is a measurement.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

NAME = "pretended"
FREE_BYTES = 8 << 30


class Event:
    """A moment, in ms as CUDA's events count."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        return 1e3 * max(end_event._at - self._at, 1e-7)

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


RUNTIME = SimpleNamespace(  # what cudart() answers: memory that is locked stays as it is
    cudaError=SimpleNamespace(success=0),
    cudaHostRegister=lambda address, size, flags: 0,
    cudaHostUnregister=lambda address: None,
)


class Graph:
    """A ``CUDAGraph``: :func:`pretended` gives it the executor that was captured."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.replay: Callable[[], object] = lambda: None

    def reset(self) -> None: ...


def _set_device(device: Any) -> None:
    """Only one with an index, as torch does."""
    from torch.cuda._utils import _get_device_index

    _get_device_index(device)


ANSWERS: dict[str, Callable[..., object]] = {
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (FREE_BYTES, FREE_BYTES),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_stats": lambda device=None: {"allocation.all.allocated": 0},
    "set_device": _set_device,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_stream": lambda stream: None,
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "_sleep": lambda cycles: None,
    "graph_pool_handle": lambda: (0, 1),
}


def _held_to(real: Callable[..., object], answer: Callable[..., object]) -> Callable[..., object]:
    """``answer``, for calls that the real function takes."""
    signature = inspect.signature(real)

    @wraps(real)
    def called(*args: Any, **kwargs: Any) -> object:
        signature.bind(*args, **kwargs)
        return answer(*args, **kwargs)

    return called


def _graph(
    cuda_graph: Graph, pool: object = None, stream: object = None, capture_error_mode: str = "global"
) -> AbstractContextManager[None]:
    """What runs while it is captured runs: it changes no state, for its samples are NaN."""
    return nullcontext()


@contextmanager
def pretended() -> Iterator[str]:
    """Inside, torch.cuda answers; where tensors are to be put. Before a kernel of ours is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from cinemesh.parallel.runtime import host
    from cinemesh.parallel.runtime.executor import Executor
    from cinemesh.parallel.runtime.graph import GraphPool

    bind, capture = Executor.__init__, GraphPool.capture

    def bound(executor: Executor, *args: Any, **kwargs: Any) -> None:
        bind(executor, *args, **kwargs)
        executor.device = "cuda"  # so that a step is captured as on a GPU

    def captured(pool: GraphPool, executor: Executor, **kwargs: Any) -> Any:
        graph, failure = capture(pool, executor, **kwargs)
        if graph is not None:
            graph.graph.replay = executor.run
        return graph, failure

    with ExitStack() as patches:
        for name, answer in ANSWERS.items():
            patches.enter_context(patch.object(torch.cuda, name, _held_to(getattr(torch.cuda, name), answer)))
        for name, stand_in in {"Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": _graph}.items():
            patches.enter_context(patch.object(torch.cuda, name, stand_in))
        patches.enter_context(patch.object(host, "cudart", lambda: RUNTIME))
        patches.enter_context(patch.object(Executor, "__init__", bound))
        patches.enter_context(patch.object(GraphPool, "capture", captured))
        yield "cpu"
