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
        total = linear(b, x, weights[1], "tbi,io->tbo", "total", add_to=first)
        return first, total, total, weights
    second = linear(b, x, weights[1], "tbi,io->tbo", "second")
    (total,) = b.op("residual", [first, second], "total")
    return first, second, total, weights


def test_a_sum_in_place_of_what_was_read_before_names_its_remedy() -> None:
    """Its gradient before the sum and after it are two: refused, whatever the degrees."""
    b = Builder(Plan())
    b.training = True
    x = b.input("x", (6, 1, WIDTH), "float32", Placement(((), (), ())))
    weights = [b.parameter(b.input(name, (WIDTH, WIDTH), "float32", replicated(2))) for name in ("w1", "w2", "w3")]
    first = linear(b, b.parameter(x), weights[0], "tbi,io->tbo", "first")
    linear(b, first, weights[1], "tbi,io->tbo", "second")
    with pytest.raises(PlacementError, match=r"total: adds in place to first, which second read .* op\('residual'"):
        linear(b, x, weights[2], "tbi,io->tbo", "total", add_to=first)


def test_the_gradient_of_a_sum_in_place_is_that_of_both_terms() -> None:
    b = Builder(Plan())
    b.training = True
    first, second, total, weights = two_products(b, in_place=True)
    with b.backward():
        (dtotal,) = b.op("sum_to", [total], "dtotal", signature="tbi->tbi")
        dx = linear_input_backward(b, dtotal, first, weights[0], "dx_of_first")
        dx = linear_input_backward(b, dtotal, second, weights[1], "dx", add_to=dx)
    assert dx.placement == total.placement


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


def test_frozen_weights_have_no_gradient() -> None:
    """Neither they, nor what depends on nothing else: a backward record that makes one all the same is refused."""
    b = Builder(Plan())
    b.training = True
    x = b.input("x", (6, 1, WIDTH), "float32", Placement(((), (), ())))
    frozen = b.input("w1", (WIDTH, WIDTH), "float32", replicated(2))
    trained = b.parameter(b.input("w2", (WIDTH, WIDTH), "float32", replicated(2)))
    h = linear(b, x, frozen, "tbi,io->tbo", "h")
    y = linear(b, h, trained, "tbi,io->tbo", "y")
    assert not b.needs_gradient(h)
    assert b.needs_gradient(y)
    with b.backward():
        (dy,) = b.op("sum_to", [y], "dy", signature="tbi->tbi")
        dh = linear_input_backward(b, dy, y, trained, "dh")
        (added,) = b.op("add", [dh], "dh_more", add_to=dh)
        with pytest.raises(PlacementError, match="nobody reads"):
            b.finish({})
        b.discard(added)
