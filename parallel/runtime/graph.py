"""CUDA Graph capture of a bound program: one graph a bucket shape, one memory pool, one side stream.

A capture runs the executor once while the stream records: forward, backward, every collective, clipping, AdamW and EMA
become one graph. What changes between steps lies in device buffers (inputs, lr, counters). docs/cuda_graphs.md lists
the pitfalls and what guards against each.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...errors import CinemeshError, in_a_line
from .comm import barrier, gather_objects
from .executor import Executor

WARM_UP_STEPS = 2  # the first compiles kernels and connects communicators, the second shows that it did
STALL_S = 1800.0  # as the groups' own time-out, which does not see a replay


@dataclass
class Graph:
    """One captured step; ``pool_bytes``: what its kernels' own temporaries take of the pool, the arena excluded."""

    graph: torch.cuda.CUDAGraph
    pool_bytes: int

    def run(self) -> None:
        """Launch on the current stream, behind whatever filled the inputs there."""
        self.graph.replay()


class GraphPool:
    """Every graph of this process: they never run at the same time, so they share one pool and one stream."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.handle = torch.cuda.graph_pool_handle()
        self.graphs: list[Graph] = []

    @property
    def bytes(self) -> int:
        return sum(graph.pool_bytes for graph in self.graphs)

    def warm_up(self, executor: Executor) -> None:
        """Real steps on the stream of the capture: lazy set-up may not happen inside one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_STEPS):
                executor.run()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, executor: Executor, *, keep: bool = False) -> tuple[Graph | None, str | None]:
        """The graph, or why there is none, with the op's name. Nothing is executed. All ranks capture together.

        ``keep`` leaves it readable (``graph.debug_dump``).
        """
        torch.cuda.synchronize()  # the watchdog has no event left to query
        if executor.comm is not None:
            barrier()
        graph = torch.cuda.CUDAGraph(keep_graph=keep)
        if keep:
            graph.enable_debug_mode()
        torch.cuda.empty_cache()  # the capture does so too: what is reserved after it is the pool's
        before, outside = torch.cuda.memory_reserved(self.device), torch.cuda.current_stream()
        at = "the start"
        try:
            with (
                torch.cuda.graph(graph, pool=self.handle, stream=self.stream, capture_error_mode="thread_local"),
                torch.no_grad(),
            ):
                for record in executor.records:
                    at = f"{record.op.name} ({record.op.kind})"
                    record.run()
            if keep:
                graph.instantiate()
        except RuntimeError as error:  # CUDA's refusals, and torch's
            torch.cuda.set_stream(outside)  # a capture that fails leaves its own as the current one
            if executor.comm is not None:
                executor.comm.forget()
            return None, f"{at}: {in_a_line(error, lines=1)}"
        made = Graph(graph, torch.cuda.memory_reserved(self.device) - before)
        self.graphs.append(made)
        return made, None

    def close(self) -> None:
        """Before the process groups: NCCL waits for graphs that hold its work."""
        torch.cuda.synchronize()
        for graph in self.graphs:
            graph.graph.reset()
        self.graphs.clear()


def vote(failure: str | None, processes: bool) -> str | None:
    """The first rank's failure, on every rank; None when none failed. Either all replay or none does."""
    failures = gather_objects(failure) if processes else [failure]
    found = [(rank, text) for rank, text in enumerate(failures) if text is not None]
    return f"rank {found[0][0]}: {found[0][1]}" if found else None


def refuse(failure: str) -> CinemeshError:
    return CinemeshError(
        f"capture is required, and a step cannot be captured: {failure}",
        remedy="mend the op, or set capture to auto or off",
    )


class Heartbeat:
    """Ends the process when a step does not finish: no watchdog looks at collectives that a graph replays.

    ``expect`` arms it with a question (is the step done?), asked from a thread of its own every ``period_s``.
    """

    def __init__(
        self,
        stall_s: float = STALL_S,
        on_stall: Callable[[str], None] | None = None,
        period_s: float = 1.0,
    ) -> None:
        self._stall_s, self._period_s = stall_s, period_s
        self._on_stall = on_stall or _abort
        self._waiting: tuple[int, float, Callable[[], bool]] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def expect(self, step: int, done: Callable[[], bool]) -> None:
        """``step`` has been launched; ``done`` answers without waiting."""
        self._waiting = (step, time.monotonic(), done)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._period_s):
            waiting = self._waiting
            if waiting is None:
                continue
            step, since, done = waiting
            if done():
                if self._waiting is waiting:
                    self._waiting = None
            elif time.monotonic() - since > self._stall_s:
                self._waiting = None
                self._on_stall(
                    f"rank {os.environ.get('RANK', '0')}: the replay of step {step} has not finished for "
                    f"{self._stall_s:.0f} s; another rank has stopped, or its graph differs"
                )


def _abort(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os.kill(os.getpid(), signal.SIGABRT)
