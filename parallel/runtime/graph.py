"""CUDA Graph capture of a bound program: one graph a bucket shape, one memory pool, one side stream.

A capture runs the executor once while the stream records: forward, backward, every collective, clipping, AdamW and EMA
become one graph. What changes between steps lies in device buffers (inputs, lr, counters). docs/cuda_graphs.md lists
the pitfalls and what guards against each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import CinemeshError, in_a_line
from .comm import barrier
from .executor import Executor

WARM_UP_STEPS = 2  # the first compiles kernels and connects communicators, the second shows that it did


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


def refuse(failure: str) -> CinemeshError:
    return CinemeshError(
        f"capture is required, and a step cannot be captured: {failure}",
        remedy="mend the op, or set capture to auto or off",
    )
