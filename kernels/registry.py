"""Op and device -> the function that runs it, as ``catalogue.py`` lists them and ``selection.py`` chooses.

What a choice depends on besides the device (dtype, head dim) is known when a kernel is first called: it is made then,
once for each combination. Ops whose choice depends on the device alone are bound directly; on a CPU that is every op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import CinemeshError
from .catalogue import Implementation, candidates
from .ops import LEAVE_SMS, OPS
from .packages import check_torch
from .reference import REFERENCE, Kernel
from .selection import Software, override_of, select
from .signature import parse
from .tuning import DEFAULT_DEVICE, device_key


class Kernels(dict[str, Kernel]):
    """Op name -> what runs it. Chosen for a ``device`` (``cpu``, ``sm_90``) by its ``software`` and ``tuned`` table."""

    def __init__(self, chosen: Mapping[str, Kernel], device: str, software: Software, tuned: str) -> None:
        super().__init__(chosen)
        self.device, self.software, self.tuned = device, software, tuned


def kernels_for(device: str, of_recipe: Mapping[str, str] | None = None, *, deterministic: bool = False) -> Kernels:
    """The implementations on ``device`` (``cpu``, ``cuda``, ``cuda:0``).

    ``of_recipe``: overrides, op (or ``all``) -> package; those of the variable CINEMESH_KERNELS win. ``deterministic``:
    only kernels that sum in one fixed order, or do when asked. CinemeshError when an override cannot be met, and where
    torch is too old.
    """
    check_torch()
    software = Software.here(of_recipe, deterministic)
    tuned = DEFAULT_DEVICE
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        device, tuned = f"sm_{major}{minor}", device_key(torch.cuda.get_device_name(device))
    return Kernels({op: _kernel(op, device, software, tuned) for op in OPS}, device, software, tuned)


def leave_sms(kernels: dict[str, Kernel], margin: int) -> dict[str, Kernel]:
    """The same kernels for CUDA, of which those of ``LEAVE_SMS`` leave ``margin`` SMs to communication.

    Products do by a setting of the whole process, which torch hands to cuBLASLt (pull request 144974 of pytorch); plain
    cuBLAS has learnt it only lately, so cuBLASLt is preferred. There it is a target that picks kernels, which on Hopper
    launch no more blocks. Raises CinemeshError when an attention that was chosen cannot leave SMs alone.
    """
    if margin == 0:
        if torch._C._get_sm_carveout_experimental() is not None:
            torch._C._set_sm_carveout_experimental(None)
        return kernels
    left = copy(kernels)
    for op in LEAVE_SMS:
        kernel = left[op]
        if op != "matmul":
            if not isinstance(kernel, _ByCall):
                raise _holds_all(op, getattr(kernel, "__module__", "").rpartition(".")[2], margin)
            left[op] = kernel.leaving(margin)
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(margin)
    return left


def _holds_all(op: str, implementation: str, margin: int) -> CinemeshError:
    able = [entry for entry in candidates(op) if entry.margin]
    return CinemeshError(
        f"plan: sm_margin({margin}): {op} runs on {implementation}, which takes every SM",
        remedy=f"use {' or '.join(entry.package for entry in able)} ({able[0].why}), or set sm_margin to 0",
    )


def function(entry: Implementation) -> Kernel:
    """The callable of an implementation; its module is imported now."""
    if entry.package == "reference":
        return REFERENCE[entry.op]
    return getattr(import_module(f".{entry.module}", __package__), entry.function)


def _kernel(op: str, device: str, software: Software, tuned: str = DEFAULT_DEVICE) -> Kernel:
    choice = select(op, device, software, tuned=tuned)
    override = override_of(op, software.overrides)
    asked = candidates(op) if override is None and device != "cpu" else (choice.entry,)
    if (device == "cpu" and override is None) or not any(entry.dtypes or entry.sizes for entry in asked):
        return function(choice.entry)
    return _ByCall(op, device, software, tuned)


class _ByCall:
    """Chooses at the first call with this dtype and these sizes of the labels that implementations look at."""

    def __init__(self, op: str, device: str, software: Software, tuned: str, margin: int = 0) -> None:
        self.op, self.device, self.software, self.tuned, self.margin = op, device, software, tuned, margin
        asked = {label for entry in candidates(op) for label, _, _ in entry.sizes}
        signature = OPS[op].signature
        self._places = [place for place in parse(signature).places if place[0] in asked] if signature else []
        self._chosen: dict[tuple[Any, ...], Kernel] = {}

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], **attrs: Any) -> None:
        dtype = next(x.dtype for x in (*inputs, *outputs) if x.dtype.is_floating_point)
        key = (dtype, *[inputs[i].shape[dim] for _, i, dim in self._places])
        kernel = self._chosen.get(key)
        if kernel is None:
            sizes = {label: size for (label, _, _), size in zip(self._places, key[1:], strict=True)}
            kernel = self._chosen[key] = self._choose(str(dtype).removeprefix("torch."), sizes)
        kernel(inputs, outputs, **attrs)

    def leaving(self, margin: int) -> _ByCall:
        """The same with ``margin`` SMs left alone. Raises CinemeshError when what the device chooses cannot."""
        left = _ByCall(self.op, self.device, self.software, self.tuned, margin)
        left._choose(None, None)
        return left

    def _choose(self, dtype: str | None, sizes: dict[str, int] | None) -> Kernel:
        entry = select(self.op, self.device, self.software, dtype=dtype, sizes=sizes, tuned=self.tuned).entry
        if self.margin and not entry.margin:
            raise _holds_all(self.op, f"{entry.package} ({entry.why})", self.margin)
        asked: dict[str, Any] = {"sm_margin": self.margin} if self.margin else {}
        if self.software.deterministic and entry.ordered == "asked":
            asked["deterministic"] = True
        return partial(function(entry), **asked) if asked else function(entry)
