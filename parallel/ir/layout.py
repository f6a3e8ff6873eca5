"""Placements: who holds what, and the one rule by which every compute op places its outputs (torch-free).

A buffer has a GLOBAL shape. Its placement says, for each dim, the ordered mesh axes that split it, outer to inner
(video tokens are ``("cp", "tp")``), and over which axes its values are Partial (to be summed). An axis that is in
neither place is replicated. Local shapes are derived.

A compute op carries an einsum-like signature, ``"tbi,io->tbo"``, from which shape, FLOPs and placement follow:

    1. one label means one dim everywhere: it is split by the same axes in every input
    2. an axis splits at most one label, and never one label while another input is Partial over it
    3. labels named ``whole`` (the width of a norm, the keys of attention) are split by nothing
    4. a Partial input stands only in a group of inputs in which the op is linear; all members of that group are
       Partial over the same axes, and no other input is Partial (one factor of a product)
    5. a split label that an output lacks was summed over: that output is Partial over the label's axes
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from ...kernels.signature import Signature

Axes = tuple[str, ...]
NONE: Axes = ()

TOKENS: Axes = ("cp", "tp")  # where layers work token by token (sp)
TOKENS_GATHERED: Axes = ("cp",)  # between the tp gather and the tp reduce-scatter
BATCH: Axes = ("dp_replicate", "dp_shard")
HEADS: Axes = ("tp",)
REPLICA_AXES: Axes = ("dp_replicate",)
FSDP: Axes = ("dp_shard", "cp")
REPLICATED_AXES: Axes = ("dp_shard", "cp", "tp")
WORLD: Axes = ("dp_replicate", "dp_shard", "cp", "tp")


class PlacementError(Exception):
    """A program that would compute something wrong; found when it is built."""


@dataclass(frozen=True)
class Placement:
    """``dims[i]`` are the axes that split dim i, outer to inner; ``partial`` the axes still to be summed over."""

    dims: tuple[Axes, ...]
    partial: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        dims = ", ".join("*".join(axes) or "-" for axes in self.dims)
        return f"[{dims}]" + (f" Partial{{{', '.join(sorted(self.partial))}}}" if self.partial else "")

    @cached_property
    def sharded(self) -> frozenset[str]:
        return frozenset([axis for axes in self.dims for axis in axes])

    def shares(self, other: Placement) -> bool:
        """Whether ranks hold equal parts of what has either placement, whatever its shape: split and Partial alike."""
        return self.sharded == other.sharded and self.partial == other.partial

    def gathered(self, axes: Axes, dim: int) -> Placement:
        """After an all-gather: the innermost axes of ``dim`` come off; any other order is refused."""
        if not 0 <= dim < len(self.dims) or self.dims[dim][len(self.dims[dim]) - len(axes) :] != axes or not axes:
            raise PlacementError(f"all-gather over {axes} of dim {dim}: not the innermost axes of {self}")
        if self.partial & set(axes):
            raise PlacementError(f"all-gather over {axes} of a buffer that is Partial over it: {self}")
        kept = self.dims[dim][: len(self.dims[dim]) - len(axes)]
        return Placement((*self.dims[:dim], kept, *self.dims[dim + 1 :]), self.partial)

    def scattered(self, axes: Axes, dim: int) -> Placement:
        """After a reduce-scatter: Partial over ``axes`` no more, and ``dim`` is split by them, innermost."""
        if not axes or not set(axes) <= self.partial or not 0 <= dim < len(self.dims):
            raise PlacementError(f"reduce-scatter over {axes} of dim {dim}: not Partial over all of them: {self}")
        return Placement(
            (*self.dims[:dim], (*self.dims[dim], *axes), *self.dims[dim + 1 :]),
            self.partial - set(axes),
        )

    def reduced(self, axes: Axes) -> Placement:
        """After an all-reduce."""
        if not axes or not set(axes) <= self.partial:
            raise PlacementError(f"all-reduce over {axes}: not Partial over all of them: {self}")
        return Placement(self.dims, self.partial - set(axes))


def replicated(rank: int) -> Placement:
    return Placement((NONE,) * rank)


@lru_cache(maxsize=65536)
def infer(
    op: str,
    signature: Signature,
    placements: tuple[Placement, ...],
    linear: tuple[tuple[int, ...], ...],
    whole: str,
    place: tuple[tuple[str, Axes], ...],
) -> tuple[Placement, ...]:
    """Placements of the outputs, by the rule at the top of this file.

    ``place`` splits labels that only outputs have: a rank then makes or takes its own slice of what it holds whole.
    Cached by its arguments: the 48 blocks of a step are checked once.
    """
    if len(placements) != len(signature.inputs):
        raise PlacementError(f"{op}: {len(placements)} inputs for the signature {signature}")
    axes_of: dict[str, Axes] = {}
    owner: dict[str, str] = {}
    for labels, placement in zip(signature.inputs, placements, strict=True):
        if len(labels) != len(placement.dims):
            raise PlacementError(f"{op}: an input of {len(placement.dims)} dims for the labels {labels!r}")
        for label, axes in zip(labels, placement.dims, strict=True):
            if axes_of.setdefault(label, axes) != axes:
                raise PlacementError(
                    f"{op}: dim {label!r} is split by {axes_of[label]} in one input, by {axes} in another"
                )
    for label, axes in place:
        if label in axes_of:
            raise PlacementError(f"{op}: dim {label!r} is already placed by an input")
        axes_of[label] = axes
    for label, axes in axes_of.items():
        if axes and label in whole:
            raise PlacementError(f"{op}: dim {label!r} must be whole but is split by {axes}")
        for axis in axes:
            if owner.setdefault(axis, label) != label:
                raise PlacementError(f"{op}: axis {axis} splits the dims {owner[axis]!r} and {label!r} at once")

    carried: frozenset[str] = frozenset()
    pending = [i for i, p in enumerate(placements) if p.partial]
    if pending:
        group = next((g for g in linear if pending[0] in g), None)
        shown = "; ".join(str(p) for p in placements)
        if group is None:
            raise PlacementError(f"{op}: input {pending[0]} is Partial but the op is not linear in it: {shown}")
        carried = placements[pending[0]].partial
        if set(pending) != set(group) or any(placements[i].partial != carried for i in group):
            raise PlacementError(f"{op}: inputs {group} must be Partial over the same axes and no other input: {shown}")
        for axis in carried & set(owner):
            raise PlacementError(
                f"{op}: axis {axis} splits dim {owner[axis]!r} while an input is Partial over it: {shown}"
            )

    read = {label for labels in signature.inputs for label in labels}
    outputs: list[Placement] = []
    for labels in signature.outputs:
        summed = {axis for label in read - set(labels) for axis in axes_of[label]}
        outputs.append(Placement(tuple(axes_of.get(label, NONE) for label in labels), carried | summed))
    return tuple(outputs)


def local_shape(shape: tuple[int, ...], placement: Placement, sizes: dict[str, int]) -> tuple[int, ...]:
    """What one rank holds. A dim that its axes do not divide is refused."""
    local: list[int] = []
    for size, axes in zip(shape, placement.dims, strict=True):
        if not axes:
            local.append(size)
            continue
        parts = math.prod([sizes[axis] for axis in axes])
        if size % parts:
            raise PlacementError(f"a dim of {size} is split over {axes} = {parts} ranks; {size} % {parts} != 0")
        local.append(size // parts)
    return tuple(local)
