"""CUDA Graph capture of a bound program: one graph a bucket shape, one memory pool, one side stream.

A capture runs the executor once while the stream records: forward, backward, every collective, clipping, AdamW and EMA
become one graph. What changes between steps lies in device buffers (inputs, lr, counters). docs/cuda_graphs.md lists
the pitfalls and what guards against each.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from ...errors import CinemeshError, in_a_line
from .comm import barrier
from .executor import Executor
from .rehearsal import Rehearsal

_abandoned: list[torch.cuda.CUDAGraph] = []  # of captures that failed: never destroyed, see GraphPool._put_right


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
        self.rehearsal = Rehearsal()

    @property
    def bytes(self) -> int:
        return sum(graph.pool_bytes for graph in self.graphs)

    def warm_up(self, executor: Executor) -> list[str]:
        """Each thing of a step once, on the stream of the capture: lazy set-up may not happen inside one.

        Answers the names of the records that ran. What fails here ends the process, and so the job: other ranks wait in
        collectives, where no vote reaches them.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            ran = self.rehearsal.run(executor)
        torch.cuda.current_stream().wait_stream(self.stream)
        return ran

    def capture(self, executor: Executor, *, keep: bool = False) -> tuple[Graph | None, str | None]:
        """The graph, or why there is none, with the op's name. Nothing is executed. All ranks capture together.

        Whatever failed, a rank has this answer for the vote; only what ends a process, as Ctrl-C, is raised. ``keep``
        leaves the graph readable (``graph.debug_dump``).
        """
        torch.cuda.synchronize()  # the watchdog has no event left to query
        if executor.comm is not None and torch.distributed.is_initialized():  # not by a rank without its peers
            barrier()
        graph = torch.cuda.CUDAGraph(keep_graph=keep)
        if keep:
            graph.enable_debug_mode()
        torch.cuda.empty_cache()  # the capture does so too: what is reserved after it is the pool's
        before, outside = torch.cuda.memory_reserved(self.device), torch.cuda.current_stream()
        at, cause = "the start", None
        try:
            with (
                torch.cuda.graph(graph, pool=self.handle, stream=self.stream, capture_error_mode="thread_local"),
                torch.no_grad(),
            ):
                for record in executor.records:
                    at = f"{record.op.name} ({record.op.kind})"
                    try:
                        record.run()
                    except BaseException as error:
                        cause = error  # the end of the capture then fails as well, and says less
                        raise
            if keep:
                graph.instantiate()
        except BaseException as error:  # noqa: BLE001  an answer for the vote, whatever it was
            self._put_right(graph, outside)
            if executor.comm is not None:
                executor.comm.forget()
            cause = cause or error
            if not isinstance(cause, Exception):
                raise cause from None
            return None, f"{at}: {in_a_line(cause, lines=1)}"
        made = Graph(graph, torch.cuda.memory_reserved(self.device) - before)
        self.graphs.append(made)
        return made, None

    def _put_right(self, graph: torch.cuda.CUDAGraph, outside: torch.cuda.Stream) -> None:
        """What torch 2.11 to 2.13 leave behind a capture that did not end well (CUDAGraph.cpp, capture_end).

        Its stream stays the current one, and both allocators go on asking the graph, by its address, whether an
        allocation is its own: those of the device until they are told, those of pinned memory for good. So the graph
        lives on, and what is captured next has another pool: this one would be taken for one that is being filled.
        """
        torch.cuda.set_stream(outside)
        _abandoned.append(graph)
        pool, self.handle = self.handle, torch.cuda.graph_pool_handle()
        with suppress(RuntimeError):  # the capture had ended, or not begun: then the graph itself lets go of the pool
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)

    def close(self) -> None:
        """Before the process groups: NCCL waits for graphs that hold its work."""
        torch.cuda.synchronize()
        for graph in self.graphs:
            graph.graph.reset()
        self.graphs.clear()


def refuse(failure: str) -> CinemeshError:
    return CinemeshError(
        f"capture is required, and a step cannot be captured: {failure}",
        remedy="mend the op, or set capture to auto or off",
    )
