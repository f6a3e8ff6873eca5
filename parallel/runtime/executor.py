"""Runs a program on tensors that lie in one arena.

Binding resolves everything that does not change between steps: storages, views, kernels, rank offsets. A step is then a
walk over a flat list. Shapes and dtypes are checked once, when bound: torch writes past a view in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.dtypes import TORCH_DTYPES
from ...kernels.ops import OPS
from ...kernels.reference import Kernel, product_of
from ...kernels.registry import Kernels, kernels_for, leave_sms
from ..ir.collectives import FUSED
from ..ir.layout import HEADS
from ..ir.marks import MARK_NUMBERS, MARK_SLOT, is_marked
from ..ir.program import Program
from ..ir.records import BufferKind, Op, Space
from ..ir.units import communicator_order, nested_index
from ..passes.arena import Arena, place_all
from ..passes.device_memory import Workspaces, check_fits
from ..passes.liveness import persistent
from .comm import BoundCollective, Communicator
from .host import HostLink


@dataclass(slots=True)
class BoundRecord:
    """One record bound to tensors. ``attrs``: what its kernel is called with; empty for collectives and waits.

    ``parts``: of a fused record that runs as its parts, those; else none.
    """

    op: Op
    inputs: list[Tensor]
    outputs: list[Tensor]
    attrs: dict[str, Any]
    run: Callable[[], object]
    parts: tuple[BoundRecord, ...] = ()


def _run_all(parts: tuple[BoundRecord, ...]) -> None:
    for part in parts:
        part.run()


class Executor:
    """One program bound to one rank. ``inputs`` and ``states`` are tensors that live as long as the executor."""

    def __init__(  # noqa: PLR0913  a program and a place for it; the rest is what another executor has already
        self,
        program: Program,
        coordinates: dict[str, int],
        comm: Communicator | None,
        device: str = "cpu",
        kernels: dict[str, Kernel] | None = None,
        shared: dict[str, Tensor] | None = None,
        arena: Tensor | None = None,
        host_arena: Tensor | None = None,
        beside: Mapping[str, int] | None = None,
        placement: Mapping[Space, Arena] | None = None,
    ) -> None:
        """``comm`` may be None when every axis has one rank. ``shared`` are storages of another executor, by name.

        ``beside``: bytes that the process is still to take of a CUDA device, by what for. Raises CinemeshError when
        they and the program do not fit into what is free there.

        ``arena``: bytes in which the temporaries lie, of another executor that never runs at the same time; where it is
        too small, or None, the executor has its own. ``host_arena``: the same, of those in host memory.
        ``placement``: where in these the temporaries lie, if that is known.
        """
        self.program = program
        self.device = device
        self.coordinates = coordinates
        self.comm = comm
        self.kernels = kernels or kernels_for(device)
        placement = placement or place_all(program)
        self.placement, self.host_placement = placement[Space.DEVICE], placement[Space.HOST]
        if torch.device(device).type == "cuda":
            self._check_free(beside, shared or {}, 0 if arena is None else arena.numel())
            self.kernels = leave_sms(self.kernels, program.plan.sm_margin)
        if arena is None or arena.numel() < self.placement.total_bytes:
            arena = torch.empty(self.placement.total_bytes, dtype=torch.uint8, device=device)
        self.arena = arena
        self.host = HostLink(self.host_placement.total_bytes, device, host_arena)
        self._issued: dict[str, BoundCollective] = {}  # by the name of the issue, until its wait is bound
        self._flat: dict[str, Tensor] = {}  # every storage, as one row of its elements
        self._tensors: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        for name in persistent(program):
            buffer = program.buffers[name]
            tensor = (shared or {}).get(name)
            if buffer.kind is BufferKind.WORKSPACE:  # through which ranks of a tp group read each other's rows
                assert comm is not None
                tensor = comm.symmetric_memory(HEADS, program.bytes(name)).view(TORCH_DTYPES[buffer.dtype])
            if tensor is None:
                where = device if buffer.space is Space.DEVICE else "cpu"
                tensor = torch.zeros(program.local_shape(name), dtype=TORCH_DTYPES[buffer.dtype], device=where)
            assert tensor.shape == program.local_shape(name) and tensor.dtype == TORCH_DTYPES[buffer.dtype], name
            self.buffers[name] = tensor
            self._flat[name] = tensor.view(-1)
        if is_marked(program):
            self.buffers[MARK_NUMBERS].copy_(torch.arange(len(program.ops)))
        for whole, placed in ((arena, self.placement), (self.host.arena, self.host_placement)):
            for name, offset in placed.offsets.items():
                part = whole[offset : offset + program.bytes(name)]
                self._flat[name] = part.view(TORCH_DTYPES[program.buffers[name].dtype])
        self.records = [self._bind(op) for op in program.ops]

    @property
    def workspace(self) -> Callable[[Program, Op], int]:
        """Bytes that the kernel of a record takes besides its outputs."""
        known = self.kernels
        if not isinstance(known, Kernels):
            return Program.workspace_bytes
        return Workspaces(known.device, known.software, known.tuned).bytes

    def _check_free(self, beside: Mapping[str, int] | None, shared: Mapping[str, Tensor], arena_bytes: int) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        held = [name for name in persistent(self.program) if name in shared and name != MARK_SLOT]
        placed = {"arena_bytes": arena_bytes, "placed": self.placement}
        check_fits(self.program, free, self.workspace, beside=beside, shared=held, **placed)

    # -- binding ------------------------------------------------------------------------------------------------

    def _bind(self, op: Op) -> BoundRecord:
        inputs, outputs = [self.tensor(name) for name in op.inputs], [self.tensor(name) for name in op.outputs]
        if op.is_wait:
            return BoundRecord(op, inputs, outputs, {}, self._issued.pop(op.waits_for).wait)
        if op.to is not None:
            copy = self._issued[op.name] = self.host.bind(op.to, inputs[0], outputs[0])
            return BoundRecord(op, inputs, outputs, {}, copy.issue)
        if op.kind in FUSED:
            return self._bind_fused(op, inputs, outputs)
        if op.kind not in OPS:
            assert self.comm is not None, f"{op.name}: a collective over {op.axes} without processes"
            staging = outputs[1] if len(outputs) > 1 else None
            collective = self.comm.bind(op.kind, op.axes, inputs[0], outputs[0], staging)
            self._issued[op.name] = collective
            return BoundRecord(op, inputs, outputs, {}, collective.issue)
        attrs = {key: value for key, value in op.attrs.items() if key not in ("rank_axes", "shard_axes")}
        for key in ("rank_axes", "shard_axes"):
            if key in op.attrs:
                axes = op.attrs[key]
                ordered = communicator_order(self.program.plan, axes) if key == "shard_axes" else axes
                attrs["rank"] = nested_index(self.program.plan, ordered, self.coordinates)
        if len(op.inputs) > len(self.program.label_signature(op).inputs):
            attrs["add"] = True
        return BoundRecord(op, inputs, outputs, attrs, partial(self.kernels[op.kind], inputs, outputs, **attrs))

    def _bind_fused(self, op: Op, inputs: list[Tensor], outputs: list[Tensor]) -> BoundRecord:
        """On a CPU its parts, one after the other; on CUDA one call of ``comm.py``."""
        parts = tuple(self._bind(part) for part in op.parts)
        if self.device == "cpu":
            return BoundRecord(op, inputs, outputs, {}, partial(_run_all, parts), parts)
        assert self.comm is not None
        products = [part for part in parts if part.op.kind == "matmul"]
        matrices = [
            product_of(product.attrs["signature"], product.inputs[0], product.inputs[1], product.outputs[0])
            for product in products
        ]
        if op.kind == "gather_matmul":
            run = self.comm.bind_gather_products(op.axes, inputs[0], outputs[0], matrices)
        else:
            added = inputs[2] if len(inputs) > 2 else None
            run = self.comm.bind_product_scatter(op.axes, matrices[0], added, outputs[-1], outputs[0])
        return BoundRecord(op, inputs, outputs, {}, run)

    # -- running ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, watch: Callable[[int], None] | None = None) -> None:
        """One step on the inputs and states as they are. ``watch`` is called after every record (tests)."""
        if watch is None:
            for record in self.records:
                record.run()
            return
        for i, record in enumerate(self.records):
            record.run()
            watch(i)

    def tensor(self, name: str) -> Tensor:
        """The place of a buffer. A temporary holds its value only from its first write to its last read."""
        if name not in self._tensors:
            root, offset = self.program.root(name)
            shape = self.program.local_shape(name)
            self._tensors[name] = self._flat[root].as_strided(
                shape, self.program.local_strides(name), self._flat[root].storage_offset() + offset
            )
        return self._tensors[name]

    def load(self, name: str, value: Tensor) -> None:
        """Copy a value into an input or state."""
        target = self.buffers[name]
        assert value.shape == target.shape, f"{name}: {tuple(value.shape)}, wanted {tuple(target.shape)}"
        if target.is_cuda and not value.is_cuda:  # from pageable memory the host would wait, behind the step before
            value = value.to(target.dtype).contiguous().pin_memory()
        target.copy_(value, non_blocking=True)
