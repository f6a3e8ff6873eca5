"""How many bytes a launch moves, by count of its loads and stores under Triton's interpreter.

Some programs of the launch run, on zeros, in place of all. Every element of every load and store that is not masked off
counts; an address that one instruction touches twice counts once. What L2 saves when two programs read the same vector
is not subtracted: the figure is an upper bound of the traffic with memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .dtypes import BY_TRITON_NAME
from .spec import Spec

SAMPLES = 65  # programs that run: the first, the last, and some between
HEAVY_SAMPLES = 5  # of programs that move more than HEAVY_BYTES each
HEAVY_BYTES = 1 << 19
COMPUTE_BOUND_SAMPLES = 1  # one program of attention walks every key


def count_bytes(spec: Spec) -> int:
    """Bytes that all programs of a launch load and store. The kernel must have been imported under the interpreter."""
    from triton.runtime import interpreter

    class Executor(interpreter.GridExecutor):
        """Leaves the arguments where they are: copying them back would touch every page of them."""

        def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
            pass

    arguments: dict[str, Any] = dict(spec.constexprs)
    for name, kind in spec.signature.items():
        value = spec.arguments[name]
        if isinstance(value, tuple):  # zeroed lazily: a page that no program touches takes no memory
            kinds = (kind,) if isinstance(kind, str) else kind
            zeros = tuple(torch.zeros(value, dtype=BY_TRITON_NAME[each.removeprefix("*")]) for each in kinds)
            arguments[name] = zeros[0] if isinstance(kind, str) else zeros
        else:
            arguments[name] = value
    heavy = spec.least_bytes > HEAVY_BYTES * math.prod(spec.grid)
    light = HEAVY_SAMPLES if heavy else SAMPLES
    programs = sample(spec.grid, light if spec.memory_bound else COMPUTE_BOUND_SAMPLES)
    quiet = np.errstate(all="ignore")  # a softmax over a mask of zeros divides by nothing
    with quiet, _tally(interpreter.interpreter_builder, spec.grid, programs) as moved:
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
def _tally(builder: Any, grid: Sequence[int], programs: Sequence[tuple[int, int, int]]) -> Iterator[list[int]]:
    """Number the programs as ``programs`` of ``grid``; yields a list that gets the bytes of each program."""
    moved: list[int] = []
    names = ("set_grid_dim", "set_grid_idx", "create_masked_load", "create_masked_store")
    set_dim, set_program, load, store = (getattr(builder, name) for name in names)

    def add(pointers: Any, mask: Any) -> None:
        item = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        moved[-1] += np.unique(touched).size * max(1, item)

    def counted_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        add(pointers, mask)
        return load(pointers, mask, *rest, **named)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(pointers, mask)
        return store(pointers, value, mask, *rest)

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
