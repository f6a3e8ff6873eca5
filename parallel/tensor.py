"""Tensor and sequence parallel layers: forward and backward records (torch-free).

R ranks on tp. Tokens are split by (cp, tp); between gather and scatter they are split by cp only.

    column:  xg = all_gather_tp(x)             y = xg W          W split by output
             dxg = dy W^T (Partial tp)          dx = reduce_scatter_tp(dxg)      dW = xg^T dy
    row:     z = y W (Partial tp)               out = reduce_scatter_tp(z)        W split by input
             dz = all_gather_tp(dout)           dy = dz W^T                       dW = y^T dz

The gather of forward and the reduce-scatter of backward are each other's duals, and the other way round.
"""

from __future__ import annotations

from .builder import Builder
from .layout import HEADS
from .program import Buffer


def gather_tokens(b: Builder, x: Buffer, name: str) -> Buffer:
    """[T, B, D] split by (cp, tp) -> split by cp."""
    return b.all_gather(x, HEADS, name)


def scatter_tokens(b: Builder, partial: Buffer, name: str) -> Buffer:
    """[T, B, D] Partial over tp, split by cp -> summed, split by (cp, tp)."""
    return b.reduce_scatter(partial, HEADS, name)


def gather_tokens_backward(b: Builder, gradient: Buffer, gathered: Buffer, name: str) -> Buffer:
    return b.reduce_scatter(gradient, HEADS, name, of=b.producer(gathered))


def scatter_tokens_backward(b: Builder, gradient: Buffer, scattered: Buffer, name: str) -> Buffer:
    return b.all_gather(gradient, HEADS, name, of=b.producer(scattered))


def linear(b: Builder, x: Buffer, weight: Buffer, signature: str, name: str) -> Buffer:
    """One product; ``signature`` names the labels of x, weight and output, e.g. ``tbi,ihk->tbhk``."""
    return b.op("matmul", [x, weight], name, signature=signature)[0]


def linear_weight_backward(b: Builder, dy: Buffer, y: Buffer, x: Buffer, dw: Buffer) -> None:
    """dW = x^T dy, written into its place in the unit's flat gradient."""
    x_labels, w_labels, y_labels = _labels(b, y)
    b.op(
        "matmul",
        [x, dy],
        f"d{_last(y)}_weight",
        signature=f"{x_labels},{y_labels}->{w_labels}",
        into={0: dw},
        dtypes=dw.dtype,
        of=b.producer(y),
        gradient=dy,
        wrt={0: 1},
    )


def linear_input_backward(
    b: Builder,
    dy: Buffer,
    y: Buffer,
    weight: Buffer,
    name: str,
    *,
    add_to: Buffer | None = None,
    dtype: str | None = None,
) -> Buffer:
    """Dx = dy W^T, added into ``add_to`` when given."""
    x_labels, w_labels, y_labels = _labels(b, y)
    return b.op(
        "matmul",
        [dy, weight],
        name,
        signature=f"{y_labels},{w_labels}->{x_labels}",
        dtypes=dtype or dy.dtype,
        add_to=add_to,
        of=b.producer(y),
        gradient=dy,
        wrt={0: 0},
    )[0]


def _labels(b: Builder, y: Buffer) -> tuple[str, str, str]:
    left, out = b.producer(y).attrs["signature"].split("->")
    x, weight = left.split(",")
    return x, weight, out


def _last(buffer: Buffer) -> str:
    return buffer.name.rpartition("/")[2]
