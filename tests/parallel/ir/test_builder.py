"""What the builder says of mistakes that a layer's author makes: the remedy stands in the message."""

from __future__ import annotations

import pytest

from cinemesh.parallel.ir.builder import Builder
from cinemesh.parallel.ir.layout import Placement, PlacementError, replicated
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import Buffer
from cinemesh.parallel.layers.tensor import linear, linear_input_backward

WIDTH = 8


def two_products(b: Builder, in_place: bool) -> tuple[Buffer, Buffer, Buffer, list[Buffer]]:
    """x W1 + x W2, and the buffers that backward needs."""
    x = b.input("x", (6, 1, WIDTH), "float32", Placement(((), (), ())))
    weights = [b.parameter(b.input(name, (WIDTH, WIDTH), "float32", replicated(2))) for name in ("w1", "w2")]
    first = linear(b, b.parameter(x), weights[0], "tbi,io->tbo", "first")
    if in_place:
        (total,) = b.op("matmul", [x, weights[1]], "total", signature="tbi,io->tbo", add_to=first)
        return x, first, total, weights
    second = linear(b, x, weights[1], "tbi,io->tbo", "second")
    (total,) = b.op("residual", [first, second], "total")
    return first, second, total, weights


def test_a_sum_in_place_of_what_is_differentiated_names_its_remedy() -> None:
    """Uses of the old name and of the new one cannot be told apart: refused, whatever the degrees."""
    b = Builder(Plan())
    b.training = True
    _, first, total, weights = two_products(b, in_place=True)
    with b.backward():
        dtotal = b.buffer("dtotal", total.shape, "float32", total.placement)
        with pytest.raises(PlacementError, match=r"total adds in place: make the sum a buffer .* op\('residual'"):
            linear_input_backward(b, dtotal, first, weights[0], "dx")


def test_so_is_the_sum_as_a_buffer_of_its_own_accepted() -> None:
    b = Builder(Plan())
    b.training = True
    first, second, total, weights = two_products(b, in_place=False)
    with b.backward():
        (dtotal,) = b.op("sum_to", [total], "dtotal", signature="tbi->tbi")
        names = {"dfirst": 0, "dsecond": 1}
        dfirst, dsecond = b.pass_through(dtotal, b.producers(total), names)
        dx = linear_input_backward(b, dfirst, first, weights[0], "dx_of_first")
        dx = linear_input_backward(b, dsecond, second, weights[1], "dx", add_to=dx)
    assert dx.placement == total.placement
