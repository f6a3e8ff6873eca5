"""Tensor and sequence parallel layers: forward and backward records (torch-free).

R ranks on tp. Tokens are split by (cp, tp); between gather and scatter they are split by cp only.

    column:  xg = all_gather_tp(x)             y = xg W          W split by output
             dxg = dy W^T (Partial tp)          dx = reduce_scatter_tp(dxg)      dW = xg^T dy
    row:     z = y W (Partial tp)               out = reduce_scatter_tp(z)        W split by input
             dz = all_gather_tp(dout)           dy = dz W^T                       dW = y^T dz

The gather of forward and the reduce-scatter of backward are each other's duals, and the other way round.

[Note: token slices] With ``plan.tp_slices`` = n > 1 each of these four collectives moves n times a part of this rank's
tokens, and the product next to it is made part by part, so that one part is on its way while another is computed.
Between gather and scatter the tokens of one cp rank then stand in the order [slice][tp rank][token]: layers in between
work token by token, attention does not depend on the order of its keys, and every scatter undoes it. What stands
between a scatter and the next gather is made slice by slice as well (:func:`token_local`): forward flows through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...kernels.ops import OPS, signature_of
from ...kernels.signature import Signature, parse
from ..ir.builder import Builder
from ..ir.layout import HEADS, Placement, infer
from ..ir.program import Buffer

Product = tuple[Buffer, str, str]  # weight, signature, name of the result


# -- products ---------------------------------------------------------------------------------------------------------


def linear(b: Builder, x: Buffer, weight: Buffer, signature: str, name: str, into: Buffer | None = None) -> Buffer:
    """One product; ``signature`` names the labels of x, weight and output, e.g. ``tbi,ihk->tbhk``."""
    return b.op("matmul", [x, weight], name, signature=signature, into={0: into} if into else None)[0]


def linear_weight_backward(b: Builder, dy: Buffer, y: Buffer | Sequence[Buffer], x: Buffer, dw: Buffer) -> None:
    """dW = x^T dy, written into its place in the unit's flat gradient. ``y`` may be the slices that ``dy`` covers."""
    slices = [y] if isinstance(y, Buffer) else y
    x_labels, w_labels, y_labels = _labels(b, slices[0])
    b.op(
        "matmul",
        [x, dy],
        f"d{_role(slices[0])}_weight",
        signature=f"{x_labels},{y_labels}->{w_labels}",
        into={0: dw},
        dtypes=dw.dtype,
        of=[b.producer(part) for part in slices],
        gradient=dy,
        wrt={0: 1},
    )


def linear_input_backward(
    b: Builder,
    dy: Buffer,
    y: Buffer | Sequence[Buffer],
    weight: Buffer,
    name: str,
    *,
    add_to: Buffer | None = None,
    into: Buffer | None = None,
    dtype: str | None = None,
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
    )[0]


def _labels(b: Builder, y: Buffer) -> tuple[str, str, str]:
    left, out = b.producer(y).attrs["signature"].split("->")
    x, weight = left.split(",")
    return x, weight, out


def _role(buffer: Buffer) -> str:
    return buffer.name.rpartition("/")[2].partition(".")[0]


# -- token slices -----------------------------------------------------------------------------------------------------


def token_slices(b: Builder, x: Buffer) -> list[Buffer]:
    """``x`` itself, or its rows in ``tp_slices`` parts."""
    return [x] if b.plan.tp_slices == 1 else b.slices(x)


def _indexed(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}.t{i}" for i in range(count)]


def _places(b: Builder, name: str, like: Buffer, placement: Placement, suffix: str = "") -> tuple[Buffer | None, list]:
    """A buffer for all slices and their places in it; (None, [None]) when there is one slice: its op makes it."""
    count = b.plan.tp_slices
    if count == 1:
        return None, [None]
    whole = b.buffer(name, like.shape, like.dtype, placement)
    parts = [b.part(whole, f"{name}.t{i}{suffix}", 0, i, count) for i in range(count)]
    if not suffix:
        b.token_parts[whole.name] = parts
    return whole, parts


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
    """An op that works token by token, slice by slice; ``local``: the inputs that have tokens in front."""
    dtypes = dtypes or [inputs[0].dtype] * len(names)
    count = b.plan.tp_slices
    if count == 1:
        return b.op(kind, inputs, names, dtypes=dtypes, **attrs)
    slices = {k: token_slices(b, inputs[k]) for k in local}
    wholes: list[Buffer] = []
    places: list[list[Buffer]] = []
    for name, result in zip(names, _results(kind, signature_of(kind, attrs), inputs, dtypes), strict=True):
        whole, parts = _places(b, name, result, result.placement)
        assert whole is not None
        wholes.append(whole)
        places.append(parts)
    for i in range(count):
        operands = [slices[k][i] if k in slices else x for k, x in enumerate(inputs)]
        into = {k: parts[i] for k, parts in enumerate(places)}
        b.op(kind, operands, [f"{name}.t{i}" for name in names], dtypes=dtypes, into=into, **attrs)
    return tuple(wholes)


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


def _product_places(b: Builder, x: Buffer, product: Product) -> tuple[Buffer | None, list]:
    weight, signature, name = product
    (result,) = _results("matmul", parse(signature), (x, weight), (x.dtype,))
    return _places(b, name, result, result.placement)


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
    placement = x.placement.gathered(HEADS, 0)
    whole, into = _places(b, gathered_name, x, placement, ".issued")
    names = _indexed(gathered_name, len(into))
    weight, signature, name = products[0]
    parts: list[Buffer] = []
    first: list[Buffer] = []
    output: Buffer | None = None
    targets: list = []
    for i, rows in enumerate(token_slices(b, x)):
        parts.append(b.all_gather(rows, HEADS, names[i], into=into[i]))
        if i == 0:
            output, targets = _product_places(b, whole or parts[0], products[0])
        first.append(linear(b, parts[i], weight, signature, _indexed(name, len(into))[i], targets[i]))
    gathered = whole or parts[0]
    others = [linear(b, gathered, *product) for product in products[1:]]
    return Column(gathered, parts, first, [output or first[0], *others])


def column_input_backward(
    b: Builder, layer: Column, dfirst: Buffer, weight: Buffer, name: str, others: Buffer | None
) -> list[Buffer]:
    """The last term of the input's gradient, slice by slice: that of the first product, added to ``others``."""
    count = len(layer.parts)
    dys = [dfirst] if count == 1 else token_slices(b, dfirst)
    sums: list[Buffer | None] = [None] * count
    if others is not None:
        sums = [others] if count == 1 else [*token_slices(b, others)]
    return [
        linear_input_backward(b, dys[i], layer.first[i], weight, indexed, add_to=sums[i])
        for i, indexed in enumerate(_indexed(name, count))
    ]


def gather_tokens_backward(b: Builder, gradients: Sequence[Buffer], layer: Column, name: str) -> Buffer:
    """Reduce-scatter of the slices that :func:`column_input_backward` made: the gradient of the layer's input."""
    placement = gradients[0].placement.scattered(HEADS, 0)
    count = len(gradients)
    shape = (gradients[0].shape[0] * count, *gradients[0].shape[1:])
    whole, into = _places(b, name, Buffer("", shape, gradients[0].dtype, placement), placement, ".issued")
    results = [
        b.reduce_scatter(gradients[i], HEADS, indexed, of=b.producer(layer.parts[i]), into=into[i])
        for i, indexed in enumerate(_indexed(name, count))
    ]
    if whole is not None:
        b.token_parts[whole.name] = results
    return whole or results[0]


@dataclass
class Row:
    """Forward of product + scatter. ``partials`` and ``parts``: a slice's product, and its sum over tp."""

    out: Buffer
    partials: list[Buffer]
    parts: list[Buffer]


def row(b: Builder, y: Buffer, weight: Buffer, signature: str, partial_name: str, name: str) -> Row:
    """Multiply ``y`` and reduce-scatter the result over tp, slice by slice: [T, B, D] split by (cp, tp)."""
    slices = token_slices(b, y)
    count = len(slices)
    partials: list[Buffer] = []
    parts: list[Buffer] = []
    whole: Buffer | None = None
    into: list = [None]
    for i, rows in enumerate(slices):
        partials.append(linear(b, rows, weight, signature, _indexed(partial_name, count)[i]))
        if i == 0:
            placement = partials[0].placement.scattered(HEADS, 0)
            shape = (partials[0].shape[0] * count, *partials[0].shape[1:])
            whole, into = _places(b, name, Buffer("", shape, y.dtype, placement), placement, ".issued")
        parts.append(b.reduce_scatter(partials[i], HEADS, _indexed(name, count)[i], into=into[i]))
    if whole is not None:
        b.token_parts[whole.name] = parts
    return Row(whole or parts[0], partials, parts)


def row_backward(
    b: Builder, dout: Buffer, layer: Row, y: Buffer, weight: Buffer, dweight: Buffer, gathered_name: str, name: str
) -> Buffer:
    """Gather ``dout`` over tp slice by slice; returns the gradient of ``y``, after that of the weight."""
    count = len(layer.parts)
    placement = dout.placement.gathered(HEADS, 0)
    whole, into = _places(b, gathered_name, dout, placement, ".issued")
    dy, targets = _places(b, name, y, y.placement)
    results: list[Buffer] = []
    for i, rows in enumerate(token_slices(b, dout)):
        part = b.all_gather(rows, HEADS, _indexed(gathered_name, count)[i], of=b.producer(layer.parts[i]), into=into[i])
        whole = whole or part
        results.append(
            linear_input_backward(b, part, layer.partials[i], weight, _indexed(name, count)[i], into=targets[i])
        )
    assert whole is not None
    linear_weight_backward(b, whole, layer.partials, y, dweight)
    return dy or results[0]
