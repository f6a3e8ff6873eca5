"""How many bytes a launch moves, by count of its loads and stores under Triton's interpreter.

Some programs of the launch run in place of all, and no tensor stands behind their pointers: a load gives zeros, a store
goes nowhere, so that counting takes the memory of one program's tiles. Every element of every load and store that is
not masked off counts; an address that one instruction touches twice counts once. What L2 saves when two programs read
the same vector is not subtracted: the figure is an upper bound of the traffic with memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .dtypes import BY_TRITON_NAME
from .spec import Spec

SAMPLES = 65  # programs that run: the first, the last, and some between
HEAVY_SAMPLES = 5  # of programs that move more than HEAVY_BYTES each
HEAVY_BYTES = 1 << 19
COMPUTE_BOUND_SAMPLES = 1  # one program of attention walks every key
APART = 1 << 48  # bytes between two pointers, more than any tensor has


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks of a tensor that it is given: its type and where it would lie."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def count_bytes(spec: Spec) -> int:
    """Bytes that all programs of a launch load and store. The kernel must have been imported under the interpreter."""
    from triton.runtime import interpreter

    class Executor(interpreter.GridExecutor):
        """Takes the arguments as they are: there is nothing to bring to the host and back."""

        def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
            return args_dev, kwargs

        def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
            pass

    addresses = itertools.count(APART, APART)

    def pointer(kind: str) -> _Pointer:
        return _Pointer(BY_TRITON_NAME[kind.removeprefix("*")], next(addresses))

    arguments: dict[str, Any] = dict(spec.constexprs)
    for name, kind in spec.signature.items():
        if isinstance(kind, tuple):
            arguments[name] = tuple(pointer(each) for each in kind)
        else:
            arguments[name] = pointer(kind) if kind.startswith("*") else spec.arguments[name]
    heavy = spec.least_bytes > HEAVY_BYTES * math.prod(spec.grid)
    light = HEAVY_SAMPLES if heavy else SAMPLES
    programs = sample(spec.grid, light if spec.memory_bound else COMPUTE_BOUND_SAMPLES)
    quiet = np.errstate(all="ignore")  # a softmax over a mask of zeros divides by nothing
    with quiet, _tally(interpreter, spec.grid, programs) as moved:
        Executor(spec.kernel.rewrite(), spec.kernel.arg_names, (len(programs),))(**arguments)
    return extrapolate(moved, math.prod(spec.grid))


def extrapolate(moved: Sequence[int], programs: int) -> int:
    """Bytes of all programs from those of a sample: its ends count once, the rest stand for all between.

    The last program of a launch is often cut short.
    """
    if len(moved) == programs or len(moved) < 3:
        return round(sum(moved) * programs / len(moved))
    middle = moved[1:-1]
    return moved[0] + moved[-1] + round(sum(middle) * (programs - 2) / len(middle))


def sample(grid: Sequence[int], count: int) -> list[tuple[int, int, int]]:
    """``count`` programs of a grid, evenly spaced, first and last among them; all when there are no more."""
    x, y, z = (*grid, 1, 1)[:3]
    last = x * y * z - 1
    flat = [last // 2] if count == 1 else sorted({round(i * last / (count - 1)) for i in range(count)})
    return [(program % x, program // x % y, program // (x * y)) for program in flat]


@contextmanager
def _tally(interpreter: Any, grid: Sequence[int], programs: Sequence[tuple[int, int, int]]) -> Iterator[list[int]]:
    """Number the programs as ``programs`` of ``grid``; yields a list that gets the bytes of each program."""
    moved: list[int] = []
    builder = interpreter.interpreter_builder
    names = ("set_grid_dim", "set_grid_idx", "create_masked_load", "create_masked_store")
    set_dim, set_program = builder.set_grid_dim, builder.set_grid_idx

    def add(pointers: Any, mask: Any) -> None:
        item = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        ordered = np.sort(touched, axis=None)  # by hash, as numpy.unique does, takes twenty times as long
        moved[-1] += (int(np.count_nonzero(np.diff(ordered))) + min(1, ordered.size)) * max(1, item)

    def counted_load(pointers: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        add(pointers, mask)
        kind = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(zeros if other is None else np.where(mask.data, zeros, other.data), kind)

    def counted_store(pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        add(pointers, mask)

    def start(x: int, *_: int) -> None:
        moved.append(0)
        set_program(*programs[x])

    builder.set_grid_dim = lambda *_: set_dim(*(*grid, 1, 1)[:3])
    builder.set_grid_idx = start
    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield moved
    finally:
        for name in names:
            delattr(builder, name)
