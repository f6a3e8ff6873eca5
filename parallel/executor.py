"""Runs a program on tensors: allocate at the first write, call, free after the last use.

Binding resolves everything that does not change between steps: storages, views, kernels, rank offsets. A step is then a
walk over a flat list. Shapes and dtypes are checked once, when bound: torch writes past a view in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels.reference import Kernel
from ..kernels.registry import kernels_for
from .comm import Communicator, Pending
from .memory import lifetimes, persistent
from .ops import OPS
from .program import Op, Program
from .units import communicator_order, nested_index

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
}


@dataclass(slots=True)
class _View:
    slot: int
    storage: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Call:
    allocate: list[tuple[int, int, torch.dtype]]  # storage, elements, dtype
    views: list[_View]
    run: Callable[[list[Tensor]], None]
    free: list[int]
    drop: list[int]  # slots of the views of what is freed


class Executor:
    """One program bound to one rank. ``inputs`` and ``states`` are tensors that live as long as the executor."""

    def __init__(
        self,
        program: Program,
        coordinates: dict[str, int],
        comm: Communicator | None,
        device: str = "cpu",
        kernels: dict[str, Kernel] | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> None:
        """``comm`` may be None when every axis has one rank. ``shared`` are storages of another executor, by name."""
        self.program = program
        self.device = device
        self.coordinates = coordinates
        self.comm = comm
        self.kernels = kernels or kernels_for(device)
        self._pending: dict[str, Pending] = {}
        self._slot: dict[str, int] = {}
        self._storage: dict[str, int] = {}
        self._tensors: list[Tensor] = []
        self._storages: list[Tensor] = []
        self.buffers: dict[str, Tensor] = {}
        empty = torch.empty(0, device=device)
        for name in persistent(program):
            buffer = program.buffers[name]
            tensor = (shared or {}).get(name)
            if tensor is None:
                tensor = torch.zeros(program.local_shape(name), dtype=_DTYPES[buffer.dtype], device=device)
            assert tensor.shape == program.local_shape(name) and tensor.dtype == _DTYPES[buffer.dtype], name
            self._storage[name] = len(self._storages)
            self._storages.append(tensor.view(-1))
            self.buffers[name] = tensor
        self._calls = self._bind()
        self._tensors = [empty] * len(self._slot)
        self._storages.extend([empty] * (len(self._storage) - len(self._storages)))

    # -- binding ------------------------------------------------------------------------------------------------

    def _bind(self) -> list[_Call]:
        program, lives = self.program, lifetimes(self.program)
        made: set[str] = set()
        views_of: dict[str, list[int]] = {}
        calls: list[_Call] = []
        for i, op in enumerate(program.ops):
            allocate: list[tuple[int, int, torch.dtype]] = []
            for root in lives.allocate[i]:
                self._storage[root] = len(self._storage)
                allocate.append(
                    (
                        self._storage[root],
                        program.local_elements(root),
                        _DTYPES[program.buffers[root].dtype],
                    )
                )
            views: list[_View] = []
            for name in (*op.inputs, *op.outputs):
                if name in made:
                    continue
                made.add(name)
                root, offset = program.root(name)
                slot = self._slot.setdefault(name, len(self._slot))
                shape = program.local_shape(name)
                views.append(_View(slot, self._storage[root], shape, _contiguous_strides(shape), offset))
                views_of.setdefault(root, []).append(slot)
            free = [self._storage[root] for root in lives.free[i]]
            drop = [slot for root in lives.free[i] for slot in views_of.get(root, ())]
            calls.append(_Call(allocate, views, self._prepare(op), free, drop))
        return calls

    def _prepare(self, op: Op) -> Callable[[list[Tensor]], None]:
        inputs = [self._slot[name] for name in op.inputs]
        outputs = [self._slot[name] for name in op.outputs]
        if op.kind == "wait":
            return partial(self._wait, op.attrs["issue"])
        if op.kind not in OPS:
            return partial(self._issue, op, inputs[0], outputs)
        attrs = {key: value for key, value in op.attrs.items() if key not in ("rank_axes", "shard_axes")}
        for key in ("rank_axes", "shard_axes"):
            if key in op.attrs:
                axes = op.attrs[key]
                ordered = communicator_order(self.program.plan, axes) if key == "shard_axes" else axes
                attrs["rank"] = nested_index(self.program.plan, ordered, self.coordinates)
        arity = len(self.program.label_signature(op).inputs)
        if len(op.inputs) > arity:
            attrs["add"] = True
        kernel = self.kernels[op.kind]

        def run(tensors: list[Tensor]) -> None:
            kernel([tensors[i] for i in inputs], [tensors[i] for i in outputs], **attrs)

        return run

    def _issue(self, op: Op, source: int, outputs: list[int], tensors: list[Tensor]) -> None:
        assert self.comm is not None, f"{op.name}: a collective over {op.axes} without processes"
        staging = tensors[outputs[1]] if len(outputs) > 1 else None
        self._pending[op.name] = self.comm.issue(op.kind, op.axes, tensors[source], tensors[outputs[0]], staging)

    def _wait(self, issue: str, tensors: list[Tensor]) -> None:
        assert self.comm is not None
        self.comm.wait(self._pending.pop(issue))

    # -- running ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, watch: Callable[[int], None] | None = None) -> None:
        """One step on the inputs and states as they are. ``watch`` is called before every record's frees (tests)."""
        tensors, storages = self._tensors, self._storages
        nothing = torch.empty(0)
        for i, call in enumerate(self._calls):
            for storage, elements, dtype in call.allocate:
                storages[storage] = torch.empty(elements, dtype=dtype, device=self.device)
            for view in call.views:
                tensors[view.slot] = storages[view.storage].as_strided(view.shape, view.strides, view.offset)
            call.run(tensors)
            if watch is not None:
                watch(i)
            for slot in call.drop:
                tensors[slot] = nothing
            for storage in call.free:
                storages[storage] = nothing

    def tensor(self, name: str) -> Tensor:
        """A buffer of the step that is running; for ``watch``."""
        return self._tensors[self._slot[name]]

    def load(self, name: str, value: Tensor) -> None:
        """Copy a value into an input or state."""
        target = self.buffers[name]
        assert value.shape == target.shape, f"{name}: {tuple(value.shape)}, wanted {tuple(target.shape)}"
        target.copy_(value)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
