"""The labels of an op's dims: an einsum-like text, ``"tbi,io->tbo"``, read once (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

Sizes = Mapping[str, int]  # label -> local size


@dataclass(frozen=True)
class Signature:
    """``inputs[i]`` and ``outputs[j]`` are strings of dim labels."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def places(self) -> tuple[tuple[str, int, int], ...]:
        """(label, buffer, dim): where each label is met first, inputs before outputs."""
        found: dict[str, tuple[str, int, int]] = {}
        for i, labels in enumerate((*self.inputs, *self.outputs)):
            for dim, label in enumerate(labels):
                found.setdefault(label, (label, i, dim))
        return tuple(found.values())


@lru_cache(maxsize=1024)
def parse(text: str) -> Signature:
    left, right = text.split("->")
    return Signature(tuple(left.split(",")) if left else (), tuple(right.split(",")))
