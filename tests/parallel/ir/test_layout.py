"""The placement rule: what each refusal refuses, and that what it infers is what ranks would compute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemesh.kernels.signature import parse
from cinemesh.parallel.ir.layout import Axes, Placement, PlacementError, infer, local_shape

AXES = ("tp", "cp", "dp_shard", "dp_replicate")


def placed(*dims: Axes, partial: tuple[str, ...] = ()) -> Placement:
    return Placement(dims, frozenset(partial))


def inferred(
    signature: str,
    *inputs: Placement,
    linear: tuple[tuple[int, ...], ...] = ((0,), (1,)),
    whole: str = "",
    place: tuple[tuple[str, Axes], ...] = (),
) -> tuple[Placement, ...]:
    return infer("op", parse(signature), inputs, linear, whole, place)


TOKENS = ("cp", "tp")


def test_contracting_a_split_label_yields_partial() -> None:
    row = inferred("tbi,io->tbo", placed(("cp",), (), ("tp",)), placed(("tp",), ()))
    assert row == (placed(("cp",), (), (), partial=("tp",)),)
    wgrad = inferred("tbi,tbo->io", placed(TOKENS, ("dp_shard",), ()), placed(TOKENS, ("dp_shard",), ()))
    assert wgrad == (placed((), (), partial=("cp", "tp", "dp_shard")),)


def test_partial_passes_through_a_linear_input() -> None:
    assert inferred("tbi,io->tbo", placed((), (), (), partial=("cp",)), placed((), ())) == (
        placed((), (), (), partial=("cp",)),
    )


def test_a_label_made_by_the_op_is_placed_as_asked() -> None:
    assert inferred("b->tb", placed(("dp_shard",)), place=(("t", TOKENS),)) == (placed(TOKENS, ("dp_shard",)),)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: inferred("tb,tb->tb", placed(TOKENS, ()), placed(("cp",), ())), "dim 't' is split by"),
        (lambda: inferred("ab->ab", placed(("tp",), ("tp",))), "axis tp splits the dims 'a' and 'b' at once"),
        (lambda: inferred("tbd->tbd", placed((), (), ("tp",)), whole="d"), "dim 'd' must be whole"),
        (lambda: inferred("ab->ab", placed((), (), partial=("tp",)), linear=()), "not linear in it"),
        (
            lambda: inferred("ab,bc->ac", placed((), (), partial=("tp",)), placed((), (), partial=("tp",))),
            "and no other input",
        ),
        (
            lambda: inferred("ab,ab->ab", placed((), (), partial=("tp",)), placed((), ()), linear=((0, 1),)),
            "must be Partial over the same axes",
        ),
        (
            lambda: inferred("ab,bc->ac", placed((), (), partial=("tp",)), placed((), ("tp",))),
            "axis tp splits dim 'c' while an input is Partial over it",
        ),
        (lambda: inferred("ab->ab", placed((), (), ())), "3 dims for the labels 'ab'"),
        (lambda: inferred("ab->ab", placed((), ()), place=(("a", TOKENS),)), "already placed by an input"),
        (lambda: placed(TOKENS, ()).gathered(("cp",), 0), "not the innermost axes"),
        (lambda: placed((), ()).gathered(("tp",), 0), "not the innermost axes"),
        (lambda: placed(TOKENS).gathered((), 0), "not the innermost axes"),
        (lambda: placed(TOKENS).gathered(("tp",), 1), "not the innermost axes"),
        (lambda: placed(("tp",), partial=("tp",)).gathered(("tp",), 0), "Partial over it"),
        (lambda: placed((), ()).scattered(("tp",), 0), "not Partial over all of them"),
        (lambda: placed((), partial=("tp",)).scattered(("tp", "cp"), 0), "not Partial over all of them"),
        (lambda: placed((), partial=("tp",)).scattered(("tp",), 1), "not Partial over all of them"),
        (lambda: placed((), partial=("tp",)).reduced(("cp",)), "not Partial over all of them"),
        (lambda: placed((), partial=("tp",)).reduced(()), "not Partial over all of them"),
        (lambda: local_shape((10,), placed(TOKENS), {"cp": 2, "tp": 3}), "10 % 6 != 0"),
    ],
)
def test_refused(refused: object, message: str) -> None:
    assert callable(refused)
    with pytest.raises(PlacementError, match=message):
        refused()


axes = st.permutations(AXES).flatmap(lambda order: st.integers(1, 4).map(lambda n: tuple(order[:n])))


@given(axes, st.integers(0, 2), st.integers(1, 3))
def test_scatter_and_gather_undo_each_other(over: Axes, dim: int, dims: int) -> None:
    dim = min(dim, dims - 1)
    start = Placement(((),) * dims, frozenset(over))
    scattered = start.scattered(over, dim)
    assert not scattered.partial and scattered.dims[dim] == over
    assert scattered.gathered(over, dim) == start.reduced(over)


@given(axes)
def test_axes_come_off_innermost_first(over: Axes) -> None:
    placement = Placement((over,))
    for axis in reversed(over):
        placement = placement.gathered((axis,), 0)
    assert placement == Placement(((),))
    if len(over) > 1:
        with pytest.raises(PlacementError):
            Placement((over,)).gathered((over[0],), 0)


@given(st.dictionaries(st.sampled_from(AXES), st.integers(1, 5)), axes, st.integers(1, 7))
def test_local_parts_make_the_whole(sizes: dict[str, int], over: Axes, part: int) -> None:
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    parts = 1
    for axis in over:
        parts *= sizes[axis]
    assert local_shape((part * parts, 3), placed(over, ()), sizes) == (part, 3)
