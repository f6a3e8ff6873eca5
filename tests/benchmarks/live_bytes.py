"""Peak bytes of live tensor storages, whoever allocates them; the same witness for every implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes() as live: step(); live.restart(); step()``, then read ``live.peak_bytes``.

    A storage counts from the first operator that touches it until it is freed, once, at the size it
    has at the moment (FSDP resizes storages in place); hence the first step, which touches all that
    lives between steps. It cannot see what an operator allocates and frees inside itself, nor a
    backend's own buffers. It looks at every live storage after every operator: time nothing inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages: dict[int, StorageWeakRef] = {}

    def restart(self) -> None:
        """Forget the peak, not the storages."""
        self.peak_bytes = 0
        self._count()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operators come by here too
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((result, args, kwargs)):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self._count()
        return result

    def _add(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))

    def _count(self) -> None:
        total = 0
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, total)
