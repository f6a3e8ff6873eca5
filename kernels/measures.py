"""Counts that depend on more than the sizes of labels: what columns of the op table are made of (torch-free)."""

from __future__ import annotations

from .counts import NONE, Measure, Operands

# Draws run in chunks of this many elements: philox keeps some twenty 64-bit temporaries as large as its output.
DRAW_CHUNK = 1 << 14
# AdamW and the sum of squares walk the flat shard in chunks of this many elements: temporaries stay in cache.
FLAT_CHUNK = 1 << 16


def is_cast(o: Operands) -> bool:
    """fp32 out of bf16 factors: torch's CPU matmul cannot, so both factors are cast first."""
    return o.inputs[0].dtype != o.outputs[0].dtype


def cast_factors(o: Operands) -> int:
    """Bytes of both factors, cast."""
    return sum(x.elements for x in o.inputs[:2]) * o.item_bytes[1] if is_cast(o) else 0


def fused_attention(o: Operands) -> int:
    """Torch's fused kernel on a CPU: its own outputs, before they are copied into ours, and a key mask as floats."""
    masked = o.inputs[-1].dtype == "bool"
    return sum(x.bytes for x in o.outputs) + (o.inputs[-1].elements * (o.item_bytes[0] + 1) if masked else 0)


def times(count_of: Measure, one: Measure, first: Measure = NONE) -> Measure:
    """``one`` as many times as ``count_of`` says, besides ``first``."""
    return lambda o: first(o) + count_of(o) * one(o)


def input_count(o: Operands) -> int:
    return len(o.inputs)


def pair_count(o: Operands) -> int:
    return len(o.inputs) // 2


def flat_chunks(o: Operands) -> int:
    return -(-o.sizes["n"] // FLAT_CHUNK)


def drawn_rows(o: Operands) -> int:
    """Tokens that are drawn at once."""
    return min(o.sizes["t"], max(1, DRAW_CHUNK // (o.sizes["b"] * o.sizes["p"])))


def draw_count(o: Operands) -> int:
    return -(-o.sizes["t"] // drawn_rows(o))


def doublings(o: Operands) -> int:
    """In how many products a table of ``steps`` becomes the products of all before."""
    return (o.attrs["steps"] - 1).bit_length()


def doubled(o: Operands) -> int:
    """Elements that these products make: all but the first 1, 2, 4 ..."""
    return doublings(o) * o.attrs["steps"] - (1 << doublings(o)) + 1


def out(o: Operands) -> int:
    return o.outputs[0].elements


def is_sum(o: Operands) -> bool:
    """Not a permutation alone."""
    return o.inputs[0].elements > out(o)


def gap_bytes(o: Operands) -> int:
    """Bytes of a flat gradient's gaps."""
    return sum(stop - start for start, stop in o.attrs["gaps"]) * o.item_bytes[0]
