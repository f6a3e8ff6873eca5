"""What an op does, counted from outside of it: FLOPs, kernels, and the bytes that they move, as torch dispatches them.

The conventions of the count, all of them:

    FLOP     one floating-point result; integers, comparisons, selections and changes of sign are none. An op of torch
             that stands for several, or for a sum, counts as ``PER_OUTPUT`` and ``PER_INPUT`` say. Matrix products
             count 2 per multiply-add; where an op has any, it is they alone that count (``products``)
    kernel   one op that torch dispatches, but for views and allocations
    moved    what kernels read and write. A tensor that is given twice counts once, and so does memory that a view
             repeats; of a tensor that is indexed, the elements that are picked
    touched  of the op's own inputs the elements whose value it reads, of its outputs those that it writes, once each.
             A counter counts whole: of (step, updates) an op may read one
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cinemesh.kernels.counts import Operand, Operands
from cinemesh.kernels.ops import signature_of
from cinemesh.kernels.reference import Kernel
from cinemesh.parallel.runtime.witness import Witness

# FLOPs of an element of the result; what is not listed and makes floating-point numbers is an error.
PER_OUTPUT = {
    **dict.fromkeys(
        ("add", "sub", "rsub", "mul", "div", "reciprocal", "sqrt", "rsqrt", "exp", "log", "sin", "cos", "pow"), 1
    ),
    **dict.fromkeys(("copy", "_to_copy", "clone", "zero", "fill", "full_like", "arange", "index", "index_select"), 0),
    **dict.fromkeys(("neg", "abs", "where", "masked_fill", "clamp"), 0),
    "cumprod": 1,
    "addcmul": 2,
    "lerp": 3,  # a + w (b - a)
    "sigmoid": 3,  # 1 / (1 + exp(-x))
    "silu": 3,  # x / (1 + exp(-x))
    "silu_backward": 8,  # dy s (1 + x (1 - s)) with s = sigmoid(x)
    "logaddexp": 4,  # max + log1p(exp(-|a - b|))
    "_softmax": 4,  # x - max, exp, its sum, the quotient
}
# FLOPs of an element that is reduced, and of an element of the result.
PER_INPUT = {
    "sum": (1, 0),
    "mean": (1, 1),
    "linalg_vector_norm": (2, 1),  # squares, their sum, its root
    "logsumexp": (3, 2),  # x - max, exp, its sum; log, + max
    "dot": (2, 0),
    "index_add": (1, 0),
}
PRODUCTS = ("mm", "addmm", "bmm")
NO_KERNEL = ("empty", "empty_like", "scalar_tensor", "_unsafe_view", "lift_fresh", "detach", "alias")
WRITTEN_ONLY = ("copy_", "zero_", "fill_")
SCALED = ("add", "sub", "addcmul")  # by ``alpha`` or ``value``: one multiplication more
PICKS = ("index", "index_select", "index_add")  # along dim 0


class Elements:
    """Which elements of one tensor were read before they were written, and which were written."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._numbers = tensor, torch.arange(tensor.numel())
        self._read, self._written = (torch.zeros(tensor.numel(), dtype=torch.bool) for _ in range(2))

    def of(self, x: Tensor) -> Tensor:
        """Their numbers, laid out as the view ``x`` of the tensor."""
        return self._numbers.as_strided(x.shape, x.stride(), x.storage_offset() - self._tensor.storage_offset())

    def reads(self, numbers: Tensor) -> None:
        self._read[numbers] |= ~self._written[numbers]

    def writes(self, numbers: Tensor) -> None:
        self._written[numbers] = True

    @property
    def bytes(self) -> int:
        if self._tensor.dtype == torch.int64:  # counters and sample ids
            return self._tensor.nbytes * (int(self._read.any()) + int(self._written.any()))
        return self._tensor.element_size() * int(self._read.sum() + self._written.sum())


class Counter(TorchDispatchMode):
    """``with Counter([*inputs, *outputs]) as counted: kernel(inputs, outputs)``."""

    def __init__(self, operands: Sequence[Tensor]) -> None:
        super().__init__()
        self._elements = {x.untyped_storage().data_ptr(): Elements(x) for x in operands}
        self.kernels = self.flops = self.products = self.moved_bytes = 0

    @property
    def touched_bytes(self) -> int:
        return sum(elements.bytes for elements in self._elements.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._opname.removesuffix("_")
        if not func.is_view and name not in NO_KERNEL:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.kernels += 1
            self._count(name, given, made[0])
            self._move(func, name, given, made)
        return out

    def _count(self, name: str, given: dict[str, Any], made: Tensor) -> None:
        if not made.dtype.is_floating_point:
            return
        if name in PRODUCTS:
            left = given["mat1"] if name == "addmm" else given["self"]
            self.products += 2 * left.numel() * made.shape[-1]
        elif name in PER_INPUT:
            reduced, result = PER_INPUT[name]
            self.flops += reduced * given["source" if name == "index_add" else "self"].numel() + result * made.numel()
        else:
            scaled = name in SCALED and given.get("alpha", given.get("value", 1)) not in (1, -1)
            self.flops += (PER_OUTPUT[name] + scaled) * made.numel()

    def _move(self, func: Any, name: str, given: dict[str, Any], made: list[Tensor]) -> None:
        arguments = [a for a in func._schema.arguments if a.name in given]
        only_written = {a.name for a in arguments if a.is_out} | ({"self"} if func._opname in WRITTEN_ONLY else set())
        for x in _distinct([given[a.name] for a in arguments if a.name not in only_written]):
            numbers = None if (elements := self._of(x)) is None else elements.of(x)
            moved = _extent(x)
            if name in PICKS and x is given["self"]:
                moved = given["source"].numel() if name == "index_add" else made[0].numel()
                if numbers is not None and name != "index_add":
                    numbers = numbers[tuple(given["indices"])] if name == "index" else numbers[given["index"]]
            self.moved_bytes += x.element_size() * moved
            if elements is not None and numbers is not None:
                elements.reads(numbers)
        for x in _distinct([given[a.name] for a in arguments if a.alias_info and a.alias_info.is_write] + made):
            self.moved_bytes += x.element_size() * (given["source"].numel() if name == "index_add" else _extent(x))
            if (elements := self._of(x)) is not None:
                elements.writes(elements.of(x))

    def _of(self, x: Tensor) -> Elements | None:
        return self._elements.get(x.untyped_storage().data_ptr())


def _distinct(given: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, one that is given twice once."""
    tensors = [x for x in tree_leaves(list(given)) if isinstance(x, Tensor)]
    return list({(x.data_ptr(), x.shape, x.stride(), x.dtype): x for x in tensors}.values())


def _extent(x: Tensor) -> int:
    """Elements of memory behind ``x``: a row that it repeats counts once."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def operands_of(kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attrs: dict[str, Any]) -> Operands:
    """What a row counts by, of a call."""

    def shown(tensors: Sequence[Tensor]) -> list[Operand]:
        return [Operand(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]

    return Operands.of(signature_of(kind, attrs), shown(inputs), shown(outputs), attrs)


def allocated(kernel: Kernel, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attrs: dict[str, Any]) -> int:
    """Run, and return the most bytes that were alive besides inputs and outputs."""
    witness = Witness([*inputs, *outputs])
    before = witness.live_bytes()
    with witness:
        kernel(inputs, outputs, **attrs)
    return witness.peak_bytes - before
