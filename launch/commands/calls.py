"""The distinct calls of a step, with tensors to run one of them alone: what tuning and benchmarks time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.dtypes import TORCH_DTYPES
from ...kernels.ops import OPS
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op

RANK_ATTRIBUTES = ("rank_axes", "shard_axes")  # which rank's part a kernel computes: the first one's here

Described = tuple[tuple[int, ...], str]  # local shape and dtype


@dataclass(frozen=True)
class DistinctCall:
    """One op at one combination of shapes and dtypes, on one rank. ``times``: how often a step makes it."""

    op: str
    inputs: tuple[Described, ...]
    outputs: tuple[Described, ...]
    attrs: dict[str, Any]
    sizes: dict[str, int]
    flops: int
    bytes: int
    times: int = 1
    add: bool = False
    in_place: dict[int, int] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of the activations: the first floating tensor's."""
        floating = (dtype for _, dtype in (*self.inputs, *self.outputs) if dtype not in ("bool", "int64"))
        return next(floating, "bool")

    @property
    def shape(self) -> str:
        return " ".join(f"{label}={size}" for label, size in self.sizes.items())


def calls_of(program: Program) -> list[DistinctCall]:
    """In the order of their first appearance."""
    found: dict[tuple[object, ...], DistinctCall] = {}
    for op in program.ops:
        if op.kind in OPS:
            call = _call(program, op)
            key = (call.op, call.inputs, call.outputs, call.add, op.attrs.get("signature"))
            times = found[key].times + 1 if key in found else 1
            found[key] = DistinctCall(**{**vars(call), "times": times})
    return list(found.values())


def _call(program: Program, op: Op) -> DistinctCall:
    attrs = {name: value for name, value in op.attrs.items() if name not in RANK_ATTRIBUTES}
    if len(attrs) < len(op.attrs):
        attrs["rank"] = 0
    add = len(op.inputs) > len(program.label_signature(op).inputs)
    if add:
        attrs["add"] = True
    inputs, outputs = (
        tuple((program.local_shape(name), program.buffers[name].dtype) for name in names)
        for names in (op.inputs, op.outputs)
    )
    return DistinctCall(
        op.kind,
        inputs,
        outputs,
        attrs,
        program.label_sizes(op),
        program.flops(op),
        program.bytes_moved(op),
        add=add,
        in_place=OPS[op.kind].in_place,
    )


def tensors(call: DistinctCall, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs, and outputs, as the executor would pass them. Values are of a usual size, nothing more."""
    inputs = list(_filled(call, device))
    outputs = [
        inputs[call.in_place[i]] if i in call.in_place else torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=device)
        for i, (shape, dtype) in enumerate(call.outputs)
    ]
    if call.add:
        outputs[0] = inputs[-1]
    return inputs, outputs


def _filled(call: DistinctCall, device: str) -> Iterator[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    for position, (shape, dtype) in enumerate(call.inputs):
        x = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=device)
        if dtype == "bool":
            yield x.fill_(True)
        elif dtype == "int64":
            yield x.fill_(1)
        elif call.op.endswith("attention_backward") and position == 4:
            yield x.fill_(math.log(call.sizes["s"]) + 0.5)  # of that many scores from a normal distribution
        elif call.op in ("adamw", "clip_factor"):  # second moments and squares
            yield x.normal_(generator=generator).abs_()
        else:
            yield x.normal_(generator=generator)
