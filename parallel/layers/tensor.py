"""Tensor and sequence parallel layers: forward and backward records (torch-free).

R ranks on tp, C on cp; S tokens, T = S/C. Tokens are split by (cp, tp), between gather and scatter by cp only. Local
shapes, I and O the widths of the layer as the model has them, ``P`` what is Partial over tp:

    column     x [T/R, B, I]    W [I, O/R]
      forward  xg [T, B, I]          = all_gather_tp(x)
               y  [T, B, O/R]        = xg W
      dgrad    dxg [T, B, I] P       = dy W^T
               dx [T/R, B, I]        = reduce_scatter_tp(dxg)
      wgrad    dW [I, O/R]           = xg^T dy      xg is gathered again: kept, it would take R times the memory of x,
                                                    and forward's gather is cheap to hide (``passes/recompute.py``)

    row        y [T, B, I/R]    W [I/R, O]
      forward  z [T, B, O] P         = y W
               out [T/R, B, O]       = reduce_scatter_tp(z)
      dgrad    dz [T, B, O]          = all_gather_tp(dout)
               dy [T, B, I/R]        = dz W^T
      wgrad    dW [I/R, O]           = y^T dz       dz is the gathered one of dgrad: one gather serves both

dW is Partial over cp and the data ranks until its unit's reduce-scatter. The gather of forward and the reduce-scatter
of backward are each other's duals, and the other way round.

[Note: token slices] With ``plan.tp_slices`` = n > 1 each of these four collectives moves n times a part of this rank's
tokens, and the product next to it is made part by part, so that one part is on its way while another is computed.
Between gather and scatter the tokens of one cp rank then stand in the order [slice][tp rank][token]: layers in between
work token by token, attention does not depend on the order of its keys, and every scatter undoes it. What stands
between a scatter and the next gather is made slice by slice as well (:func:`token_local`): forward flows through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...kernels.ops import OPS, signature_of
from ...kernels.signature import Signature, parse
from ..ir.builder import Builder
from ..ir.layout import HEADS, Placement, infer
from ..ir.records import Buffer, Slice, SliceOf

Product = tuple[Buffer, str, str]  # weight, signature, name of the result


# -- products ---------------------------------------------------------------------------------------------------------


def linear(
    b: Builder,
    x: Buffer,
    weight: Buffer,
    signature: str,
    name: str,
    into: Buffer | None = None,
    part: Slice | None = None,
    add_to: Buffer | None = None,
) -> Buffer:
    """One product; ``signature`` names the labels of x, weight and output, e.g. ``tbi,ihk->tbhk``."""
    where = {"into": {0: into} if into else None, "add_to": add_to, "part": part}
    return b.op("matmul", [x, weight], name, signature=signature, **where)[0]


def linear_weight_backward(b: Builder, dy: Buffer, y: Buffer | Sequence[Buffer], x: Buffer, dw: Buffer | None) -> None:
    """dW = x^T dy, written into its place in the unit's flat gradient; nothing where W is frozen.

    ``y`` may be the slices that ``dy`` covers.
    """
    if dw is None:
        return
    slices = [y] if isinstance(y, Buffer) else y
    x_labels, w_labels, y_labels = _labels(b, slices[0])
    b.op(
        "matmul",
        [x, dy],
        f"d{slices[0].role}_weight",
        signature=f"{x_labels},{y_labels}->{w_labels}",
        into={0: dw},
        dtypes=dw.dtype,
        of=[b.producer(part) for part in slices],
        gradient=dy,
        wrt={0: 1},
    )


def linear_input_backward(  # noqa: PLR0913  operands, and four ways to write the result
    b: Builder,
    dy: Buffer,
    y: Buffer | Sequence[Buffer],
    weight: Buffer,
    name: str,
    *,
    add_to: Buffer | None = None,
    into: Buffer | None = None,
    dtype: str | None = None,
    part: Slice | None = None,
) -> Buffer:
    """Dx = dy W^T, added into ``add_to`` or written ``into`` when given."""
    slices = [y] if isinstance(y, Buffer) else y
    x_labels, w_labels, y_labels = _labels(b, slices[0])
    return b.op(
        "matmul",
        [dy, weight],
        name,
        signature=f"{y_labels},{w_labels}->{x_labels}",
        dtypes=dtype or dy.dtype,
        add_to=add_to,
        into={0: into} if into else None,
        of=[b.producer(part) for part in slices],
        gradient=dy,
        wrt={0: 0},
        part=part,
    )[0]


def _labels(b: Builder, y: Buffer) -> tuple[str, str, str]:
    left, out = b.producer(y).attrs["signature"].split("->")
    x, weight = left.split(",")
    return x, weight, out


# -- token slices -----------------------------------------------------------------------------------------------------


def token_slices(b: Builder, x: Buffer) -> list[Buffer]:
    """``x`` itself, or its rows in ``tp_slices`` parts."""
    return [x] if b.plan.tp_slices == 1 else b.slices(x)


def _which(b: Builder) -> list[Slice | None]:
    """Which slice each of an op's records makes; one record that makes all where tokens are not sliced."""
    count = b.plan.tp_slices
    return [None] if count == 1 else [Slice(SliceOf.TOKENS, i) for i in range(count)]


@dataclass
class _Target:
    """Where a result goes that is made slice by slice; no ``whole`` and no places where one op makes all of it."""

    whole: Buffer | None
    places: list[Buffer | None]


def _target(b: Builder, name: str, like: Buffer, placement: Placement, *, issued: bool = False) -> _Target:
    """``issued``: collectives write the slices, which may be read under their own names only after their waits."""
    count = b.plan.tp_slices
    if count == 1:
        return _Target(None, [None])
    whole = b.buffer(name, like.shape, like.dtype, placement)
    parts = [b.part(whole, name, 0, which, count, issued=issued) for which in _which(b) if which]
    if not issued:
        b.token_parts[whole.name] = parts
    return _Target(whole, [*parts])


def _joined(b: Builder, target: _Target, results: list[Buffer]) -> Buffer:
    """The whole that collectives have written slice by slice as ``results``."""
    if target.whole is None:
        return results[0]
    b.token_parts[target.whole.name] = results
    return target.whole


def token_local(
    b: Builder,
    kind: str,
    inputs: Sequence[Buffer],
    names: Sequence[str],
    local: Sequence[int] = (0,),
    *,
    dtypes: Sequence[str] = (),
    **attrs: Any,
) -> tuple[Buffer, ...]:
    """An op that works token by token, slice by slice; ``local``: the inputs that have tokens in front.

    Returns its outputs, whole.
    """
    dtypes = dtypes or [inputs[0].dtype] * len(names)
    if b.plan.tp_slices == 1:
        return b.op(kind, inputs, names, dtypes=dtypes, **attrs)
    slices = {k: token_slices(b, inputs[k]) for k in local}
    results = _results(kind, signature_of(kind, attrs), inputs, dtypes)
    targets = [_target(b, name, like, like.placement) for name, like in zip(names, results, strict=True)]
    for i, which in enumerate(_which(b)):
        operands = [slices[k][i] if k in slices else x for k, x in enumerate(inputs)]
        into = {k: place for k, target in enumerate(targets) if (place := target.places[i])}
        b.op(kind, operands, names, dtypes=dtypes, into=into, part=which, **attrs)
    return tuple(target.whole for target in targets if target.whole)


def _results(kind: str, signature: Signature, inputs: Sequence[Buffer], dtypes: Sequence[str]) -> list[Buffer]:
    """Shape and placement of an op's whole outputs, before there is anything to write them to."""
    spec = OPS[kind]
    placements = infer(kind, signature, tuple(x.placement for x in inputs), spec.linear, spec.whole, ())
    sizes: dict[str, int] = {}
    for labels, x in zip(signature.inputs, inputs, strict=True):
        sizes.update(zip(labels, x.shape, strict=True))
    return [
        Buffer("", tuple(sizes[label] for label in labels), dtype, placement)
        for labels, dtype, placement in zip(signature.outputs, dtypes, placements, strict=True)
    ]


@dataclass
class Column:
    """Forward of gather + products: what their backward differentiates.

    ``gathered`` is [T, B, D] split by cp; ``outputs`` one a product. ``parts``: the slices of the gathered input, and
    ``first`` those of the first product; each is one buffer, the whole, where tokens are not sliced.
    """

    gathered: Buffer
    parts: list[Buffer]
    first: list[Buffer]
    outputs: list[Buffer]


def column(b: Builder, x: Buffer, gathered_name: str, products: Sequence[Product]) -> Column:
    """Gather the tokens of ``x`` [T, B, D] over tp and multiply. The first product is made slice by slice."""
    rows = token_slices(b, x)
    gathered = _target(b, gathered_name, x, x.placement.gathered(HEADS, 0), issued=True)
    weight, signature, name = products[0]
    parts: list[Buffer] = []
    first: list[Buffer] = []
    result: _Target | None = None
    for i, which in enumerate(_which(b)):
        parts.append(b.all_gather(rows[i], HEADS, gathered_name, into=gathered.places[i], part=which))
        if result is None:  # behind the first gather: its output says how the product is placed
            (like,) = _results("matmul", parse(signature), (gathered.whole or parts[0], weight), (x.dtype,))
            result = _target(b, name, like, like.placement)
        first.append(linear(b, parts[i], weight, signature, name, result.places[i], which))
    assert result is not None
    whole = gathered.whole or parts[0]
    others = [linear(b, whole, *product) for product in products[1:]]
    return Column(whole, parts, first, [result.whole or first[0], *others])


def column_input_backward(
    b: Builder, layer: Column, dfirst: Buffer, weight: Buffer, name: str, others: Buffer | None
) -> list[Buffer]:
    """The last term of the input's gradient, slice by slice: that of the first product, added to ``others``."""
    dys = token_slices(b, dfirst)
    sums = token_slices(b, others) if others else [None] * len(dys)
    return [
        linear_input_backward(b, dys[i], layer.first[i], weight, name, add_to=sums[i], part=which)
        for i, which in enumerate(_which(b))
    ]


def gather_tokens_backward(b: Builder, gradients: Sequence[Buffer], layer: Column, name: str) -> Buffer:
    """Reduce-scatter of the slices that :func:`column_input_backward` made: the gradient of the layer's input."""
    target = _target(b, name, _of_all(gradients), gradients[0].placement.scattered(HEADS, 0), issued=True)
    results = [
        b.reduce_scatter(gradients[i], HEADS, name, of=b.producer(layer.parts[i]), into=target.places[i], part=which)
        for i, which in enumerate(_which(b))
    ]
    return _joined(b, target, results)


def _of_all(slices: Sequence[Buffer]) -> Buffer:
    """One that is as large as all slices together."""
    return replace(slices[0], shape=(slices[0].shape[0] * len(slices), *slices[0].shape[1:]))


@dataclass
class Row:
    """Forward of product + scatter. ``partials`` and ``parts``: a slice's product, and its sum over tp."""

    out: Buffer
    partials: list[Buffer]
    parts: list[Buffer]


def row(
    b: Builder,
    y: Buffer,
    weight: Buffer,
    signature: str,
    partial_name: str,
    name: str,
    add_to: Buffer | None = None,
) -> Row:
    """Multiply ``y`` and reduce-scatter the result over tp, slice by slice: [T, B, D] split by (cp, tp).

    ``add_to``: what the product is added to, in place.
    """
    slices, below = token_slices(b, y), token_slices(b, add_to) if add_to else None
    partials: list[Buffer] = []
    parts: list[Buffer] = []
    target: _Target | None = None
    for i, which in enumerate(_which(b)):
        term = below[i] if below else None
        partials.append(linear(b, slices[i], weight, signature, partial_name, part=which, add_to=term))
        if target is None:
            like = replace(_of_all([partials[0]] * len(slices)), dtype=y.dtype)
            target = _target(b, name, like, partials[0].placement.scattered(HEADS, 0), issued=True)
        parts.append(b.reduce_scatter(partials[i], HEADS, name, into=target.places[i], part=which))
    assert target is not None
    return Row(_joined(b, target, parts), partials, parts)


def row_backward(
    b: Builder,
    dout: Buffer,
    layer: Row,
    y: Buffer,
    weight: Buffer,
    dweight: Buffer | None,
    gathered_name: str,
    name: str,
) -> tuple[Buffer, Buffer]:
    """Gather ``dout`` over tp slice by slice; returns it, whole, and the gradient of ``y``, behind the weight's."""
    rows = token_slices(b, dout)
    gathered = _target(b, gathered_name, dout, dout.placement.gathered(HEADS, 0), issued=True)
    dy = _target(b, name, y, y.placement)
    parts: list[Buffer] = []
    results: list[Buffer] = []
    for i, which in enumerate(_which(b)):
        of = b.producer(layer.parts[i])
        parts.append(b.all_gather(rows[i], HEADS, gathered_name, of=of, into=gathered.places[i], part=which))
        into = dy.places[i]
        results.append(linear_input_backward(b, parts[i], layer.partials[i], weight, name, into=into, part=which))
    dz = gathered.whole or parts[0]
    linear_weight_backward(b, dz, layer.partials, y, dweight)
    return dz, dy.whole or results[0]
