"""Copies between a device and the memory of its host: pinned there, on a stream for each way, beside compute.

On a CPU both are the same memory, and a copy is done when it is issued.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.cuda import cudart

from ...errors import CinemeshError
from ..ir.records import HOST_LANES, Space
from .comm import BoundCollective
from .ledger import Entry


class HostLink:
    """One rank's copies. ``arena``: the bytes on the host in which its storages lie."""

    def __init__(self, size_bytes: int, device: str, arena: Tensor | None = None) -> None:
        """``arena``: of another executor that never runs at the same time; where it is too small, or None, its own."""
        self.ledger: list[Entry] = []
        self.record = False
        on_gpu = torch.device(device).type == "cuda"
        if arena is None or arena.numel() < size_bytes:
            arena = torch.empty(size_bytes, dtype=torch.uint8)
            if on_gpu and size_bytes:
                remedy = (
                    "offload fewer activations, in fewer blocks (raise last_blocks), or start fewer processes a server"
                )
                pin(arena, "plan: offload", remedy)
        self.arena = arena
        self.streams = {to: torch.cuda.Stream(device) for to in Space} if on_gpu and size_bytes else {}

    def bind(self, to: Space, source: Tensor, output: Tensor) -> BoundCollective:
        """A copy of one contiguous tensor onto another, resolved once for all steps.

        It starts after all compute before its issue; compute behind its wait starts after it. A capture takes it in.
        """
        entry = Entry(HOST_LANES[to], HOST_LANES[to], HOST_LANES[to], source.nbytes)
        stream = self.streams.get(to)
        done = None if stream is None else torch.cuda.Event()

        def issue() -> None:
            if self.record:
                self.ledger.append(entry)
            if stream is None or done is None:
                output.copy_(source)
                return
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output.copy_(source, non_blocking=True)
            done.record(stream)

        def wait() -> None:
            if done is not None:
                torch.cuda.current_stream().wait_event(done)

        return BoundCollective(issue, wait)


def pin(memory: Tensor, what: str, remedy: str) -> None:
    """Lock the pages of a tensor that is for ``what``, as long as it lives, or a view of it.

    Torch's own pinned memory comes in powers of two, up to twice as much, and has addresses of its own. Raises
    CinemeshError, with this ``remedy``.
    """
    runtime, address, size_bytes = cudart(), memory.data_ptr(), memory.nbytes
    assert runtime is not None
    if (error := runtime.cudaHostRegister(address, size_bytes, 0)) != runtime.cudaError.success:
        raise CinemeshError(f"{what}: {size_bytes:,} B of host memory cannot be pinned: {error}", remedy=remedy)
    unpin = weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)
    unpin.atexit = False  # the driver does so then, and a call may wait for a stream on which a collective is stuck
