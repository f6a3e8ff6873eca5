"""Watches a step from outside: which c10d ops and host copies ran, and how many bytes of storage were alive.

Independent of the executor: a TorchDispatchMode sees every op that torch dispatches, its outputs and their storages.
What a kernel allocates and frees inside one dispatched op cannot be seen from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ir.communicators import communicators
from ..ir.plan import Plan
from ..ir.records import HOST_LANES, Space, lane_name
from .ledger import Entry

# How torch's dispatcher names the collectives; gloo's reduce-scatter is an all-to-all and a sum (``comm.py``).
_KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class Witness(TorchDispatchMode):
    """``seen`` lists (kind, communicator, payload bytes) in order; ``peak_bytes`` the most storage alive after any op.

    The communicator's name is the process group's own description. ``host``: where copies to the host go.

    A count above ``ceiling_bytes`` is believed only when it lasts: gloo's threads hold the tensors of a finished
    collective for up to some milliseconds after ``wait`` returned.
    """

    def __init__(self, alive: Iterable[Tensor], ceiling_bytes: int | None = None, host: Tensor | None = None) -> None:
        super().__init__()
        self._host = None if host is None else host.untyped_storage()._cdata
        self._ceiling_bytes = ceiling_bytes
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.seen: list[tuple[str, str, int]] = []
        self.peak_bytes = 0
        for tensor in alive:
            self._note(tensor)
        self.peak_bytes = self.live_bytes()

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def live_bytes(self) -> int:
        """Bytes of all storages seen that still exist."""
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        return sum(nbytes for _, nbytes in self._live.values())

    def settles_at(self, expected_bytes: int) -> bool:
        """Whether exactly ``expected_bytes`` are alive, once gloo's threads have let go."""
        return self._wait_for(lambda live: live == expected_bytes)

    def _wait_for(self, holds: Callable[[int], bool], patience_s: float = 1.0) -> bool:
        deadline = time.monotonic() + patience_s
        while not holds(self.live_bytes()):
            if time.monotonic() > deadline:
                return False
            time.sleep(1e-4)
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.live_bytes()  # forget what died, before an address is used again
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        if func.namespace == "c10d" and (kind := _KINDS.get(func._opname)):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            group = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject))
            payload = max(t.nbytes for t in tensors)
            self.seen.append((kind, torch.distributed.ProcessGroup.unbox(group).group_desc, payload))
        if func._schema.name == "aten::copy_":
            target, source = (tensor.untyped_storage()._cdata for tensor in args[:2])
            if self._host in (target, source):
                lane = HOST_LANES[Space.HOST if target == self._host else Space.DEVICE]
                self.seen.append((lane, lane, args[0].nbytes))
        if (ceiling := self._ceiling_bytes) is not None and self.peak_bytes <= ceiling:
            self._wait_for(lambda live: live <= ceiling)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result

    def entries(self, plan: Plan) -> list[Entry]:
        """What was seen as ledger entries. A communicator that the plan does not have is a lane of its own."""
        lanes = {held.name: lane_name(held.axes) for held in communicators(plan)}
        return [Entry(kind, lanes.get(name, name), name, payload) for kind, name, payload in self.seen]
