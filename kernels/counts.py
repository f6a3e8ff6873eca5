"""How much an op does, by the local sizes of its record: what the op table's columns are written in (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .signature import Signature, Sizes

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "int64": 8, "bool": 1}


class Operand(NamedTuple):
    """A tensor of a record, on one rank."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(slots=True)
class Operands:
    """What a record works on, on one rank.

    ``sizes``: of every label. ``attrs``: those of its attributes that its row counts by. ``adds``: the last input is
    output 0 as it was, to which the result is added.
    """

    sizes: Sizes
    inputs: Sequence[Operand]
    outputs: Sequence[Operand]
    attrs: Mapping[str, Any]
    adds: bool

    @classmethod
    def of(
        cls, signature: Signature, inputs: Sequence[Operand], outputs: Sequence[Operand], attrs: Mapping[str, Any]
    ) -> Operands:
        labelled = (*inputs[: len(signature.inputs)], *outputs)
        sizes = {label: labelled[i].shape[dim] for label, i, dim in signature.places}
        return cls(sizes, inputs, outputs, attrs, len(inputs) > len(signature.inputs))

    @property
    def all_bytes(self) -> int:
        """Every input and every output once."""
        return sum(x.bytes for x in (*self.inputs, *self.outputs))

    @property
    def item_bytes(self) -> tuple[int, int]:
        """Of the narrowest and the widest floating dtype met: activations' and statistics' where a policy has two."""
        floating = {DTYPE_BYTES[x.dtype] for x in (*self.inputs, *self.outputs) if x.dtype not in ("int64", "bool")}
        return min(floating, default=0), max(floating, default=0)


Measure = Callable[[Operands], int]


def count(constant: float = 0, **per: float) -> Measure:
    """``count(3, tbd=5, d=1)``: 3 + 5 t b d + d, by the sizes of the labels."""

    def counted(o: Operands) -> int:
        return int(constant + sum(n * math.prod([o.sizes[label] for label in labels]) for labels, n in per.items()))

    return counted


NONE, ONE = count(), count(1)


def sized(narrow: Measure = NONE, wide: Measure = NONE, own: Measure = NONE, cast: Measure = NONE) -> Measure:
    """Bytes of tensors with so many elements in the narrowest and in the widest floating dtype of the record.

    ``own``: bytes of what has its own dtype under every policy: indices, masks, what Philox works in. ``cast``:
    elements in the widest dtype, where it is not the narrowest too.
    """

    def counted(o: Operands) -> int:
        least, most = o.item_bytes
        elements = wide(o) + (cast(o) if least < most else 0)
        return narrow(o) * least + elements * most + own(o)

    return counted
