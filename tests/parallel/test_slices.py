"""Parts of a buffer: where they lie, what they may not be used for, and that every part of a gradient is demanded."""

from __future__ import annotations

import pytest
import torch

from cinemesh.parallel.ir.builder import Builder
from cinemesh.parallel.ir.layout import HEADS, TOKENS, TOKENS_GATHERED, Placement, PlacementError
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Slice, SliceOf
from cinemesh.parallel.layers.tensor import linear_input_backward

SHAPE = (12, 2, 8, 3)  # tokens, samples, heads, head dim
PLACED = Placement((TOKENS_GATHERED, (), HEADS, ()))
FIRST = Slice(SliceOf.HEADS, 0)


def builder() -> Builder:
    b = Builder(Plan(tp=2, cp=3))
    b.training = True
    return b


@pytest.mark.parametrize(("dim", "count"), [(0, 4), (0, 2), (1, 2), (2, 4), (2, 2), (3, 3)])
def test_parts_are_what_chunk_gives(dim: int, count: int) -> None:
    """Of what a rank holds: its 4 tokens and 4 heads."""
    b = builder()
    whole = b.buffer("whole", SHAPE, "float32", PLACED)
    parts = [b.part(whole, "p", dim, Slice(SliceOf.KEYS, i), count) for i in range(count)]
    program = Program(b.plan, b.buffers, [], {})
    local = torch.arange(4 * 2 * 4 * 3).view(4, 2, 4, 3)
    for part, chunk in zip(parts, local.chunk(count, dim), strict=True):
        name = part.name
        found = local.as_strided(program.local_shape(name), program.local_strides(name), program.root(name)[1])
        assert torch.equal(found, chunk)
        assert program.span(name) == ("whole", int(chunk.min()), int(chunk.max()) + 1)
        assert part.shape[dim] == SHAPE[dim] // count and part.placement == PLACED
        assert (part.strides is None) == (dim == 0), "rows are contiguous: collectives may move them"


def joined(parts: int, of: int, *, summed: bool = True, twice: bool = False) -> str:
    """Join ``parts`` of the ``of`` parts of a buffer that is Partial over replicas; the message, if it is refused."""
    b = builder()
    partial = Placement(((), ()), frozenset({"dp_replicate"}))
    whole = b.buffer("whole", (1, 12), "float32", partial)
    found = []
    for i in range(parts):
        part = b.view(whole, f"p{i}", (1, 12 // of), partial, i * (12 // of))
        found.append(b.all_reduce(part, ("dp_replicate",), f"s{i}") if summed else part)
    try:
        total = b.join(whole, [*found, *found[: int(twice)]], "total", Placement(((), ())))
    except PlacementError as error:
        return str(error)
    assert total.shape == whole.shape and Program(b.plan, b.buffers, [], {}).root("total") == ("whole", 0)
    with pytest.raises(PlacementError, match="reads whole, which was overwritten"):
        b.op("copy", [whole], "late", signature="xn->xn")
    return ""


def test_parts_that_were_summed_are_a_whole_again() -> None:
    assert joined(3, 3) == ""
    assert "2 parts do not cover the 12 elements of whole once" in joined(2, 3)
    assert "join total placed" in joined(3, 3, summed=False)
    assert joined(3, 3, twice=True) != ""


def test_a_part_of_a_part() -> None:
    b = builder()
    whole = b.buffer("whole", SHAPE, "float32", PLACED)
    inner = b.part(b.part(whole, "some", 2, Slice(SliceOf.HEADS, 1), 2), "rows", 0, Slice(SliceOf.TOKENS, 3), 4)
    program = Program(b.plan, b.buffers, [], {})
    local = torch.arange(4 * 2 * 4 * 3).view(4, 2, 4, 3)
    shape, strides = program.local_shape(inner.name), program.local_strides(inner.name)
    found = local.as_strided(shape, strides, program.root(inner.name)[1])
    assert torch.equal(found, local[3:, :, 2:]) and inner.strides is not None


def test_what_a_strided_part_may_not_be_used_for() -> None:
    b = builder()
    whole = b.buffer("whole", SHAPE, "float32", PLACED)
    part = b.part(whole, "some", 2, FIRST, 2)
    with pytest.raises(PlacementError, match=r"all_gather of some\.h0, which is not contiguous"):
        b.all_gather(part, TOKENS_GATHERED, "gathered")
    with pytest.raises(PlacementError, match=r"view v of some\.h0, which is not contiguous"):
        b.view(part, "v", part.shape, PLACED)
    source = b.buffer("source", (12, 2, 4, 3), "float32", Placement((TOKENS, (), (), ())))
    target = b.part(b.buffer("t", (12, 2, 8, 3), "float32", Placement((TOKENS_GATHERED, (), (), ()))), "p", 2, FIRST, 2)
    with pytest.raises(PlacementError, match=r"into p\.h0, which is not contiguous"):
        b.all_gather(source, HEADS, "gathered", into=target)
    with pytest.raises(PlacementError, match=r"3 parts of dim 2 of whole, of which a rank holds \(4, 2, 4, 3\)"):
        b.part(whole, "thirds", 2, FIRST, 3)


def test_a_gradient_that_lacks_one_slice_is_refused() -> None:
    """Written by heads and read by rows, as dq is: every row's gradient needs every head's."""
    b = builder()
    x = b.buffer("x", (12, 2, 5), "float32", Placement((TOKENS_GATHERED, (), ())))
    w = b.parameter(b.buffer("w", (5, 8, 3), "float32", Placement(((), HEADS, ()))))
    (q,) = b.op("matmul", [x, w], "q", signature="tbi,ihk->tbhk")
    reads = [
        b.op("copy", [b.part(q, "q", 2, Slice(SliceOf.HEADS, i), 2)], f"read{i}", signature="tbhk->tbhk")[0]
        for i in range(2)
    ]
    with b.backward():
        dq = b.buffer("dq", SHAPE, "float32", PLACED)
        for i, read in enumerate(reads):
            place = b.part(dq, "dq", 2, Slice(SliceOf.HEADS, i), 2)
            b.part(dq, "dq", 0, Slice(SliceOf.TOKENS, i), 2)
            if i == 1:
                with pytest.raises(PlacementError, match=r"dq\.t0 is not the whole gradient of q; missing uses"):
                    linear_input_backward(b, b.buffers["dq.t0"], q, w, "early")
            gradient = b.buffer(f"d{read.name}", read.shape, "float32", read.placement)
            b.op(
                "copy", [gradient], f"back{i}", signature="tbhk->tbhk", into={0: place}, of=b.producer(read), wrt={0: 0}
            )
        assert linear_input_backward(b, b.buffers["dq.t1"], q, w, "dx").shape == (6, 2, 5)
