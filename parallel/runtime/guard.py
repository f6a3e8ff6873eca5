"""Watches one record while it runs: what a captured step may not do, with the op that did it.

Works without a GPU: a dispatch mode sees every call of a kernel, whether it would synchronise, how much it allocates,
and where it writes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.ops import OPS
from ..ir.check import Finding
from ..ir.collectives import FUSED
from .executor import BoundRecord
from .tape import hazard, tensors_in, written_tensors


class Guard(TorchDispatchMode):
    """``with Guard(record, workspace_bytes): record.run()``, then read ``findings``."""

    def __init__(self, record: BoundRecord, workspace_bytes: int) -> None:
        super().__init__()
        self.findings: list[Finding] = []
        self._op = f"{record.op.name} ({record.op.kind})"
        self._computes = record.op.kind in OPS
        self._allowed = [byte_range(t) for t in record.outputs]
        if not self._computes and record.op.kind not in FUSED:  # a collective and its wait may write what either names
            self._allowed += [byte_range(t) for t in record.inputs]
        self._workspace_bytes, self._most_bytes = workspace_bytes, 0
        self._own: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in record.outputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d" and self._computes:
            self._find("order", f"{func} is a collective that the program does not have")
        if func.namespace != "c10d" and (reason := hazard(func, args)) is not None:
            self._find("synchronises", f"{func} {reason}")
        if func.namespace != "c10d":
            for tensor in written_tensors(func, args, kwargs):
                self._check_written(func, tensor)
        given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in tensors_in((result, kwargs)):
            self._note(func, tensor, given)
        return result

    def _find(self, check: str, what: str) -> None:
        self.findings.append(Finding(check, self._op, what))

    def _check_written(self, func: Any, tensor: Tensor) -> None:
        held = self._own.get(tensor.untyped_storage()._cdata)
        if held is not None and not held[0].expired():
            return
        start, stop = byte_range(tensor)
        if start < stop and not any(first <= start and stop <= last for first, last in self._allowed):
            self._find("writes", f"{func} writes {tuple(tensor.shape)} outside of the record's outputs")

    def _note(self, func: Any, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if self._sizes.get(key, nbytes) != nbytes:
            self._find("writes", f"{func} resized an output from {self._sizes[key]} to {nbytes} B")
            self._sizes[key] = nbytes
        if key in given or key in self._sizes:
            return
        self._own = {k: held for k, held in self._own.items() if not held[0].expired()}
        self._own[key] = (StorageWeakRef(storage), nbytes)
        alive = sum(held for _, held in self._own.values())
        if alive > max(self._workspace_bytes, self._most_bytes):
            self._find("allocates", f"{func} brings its workspace to {alive} B; {self._workspace_bytes} B are declared")
        self._most_bytes = max(self._most_bytes, alive)


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """Addresses from the first byte of a tensor to behind its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
