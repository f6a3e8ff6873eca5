"""Low-rank factors of a product: forward and backward records (torch-free).

    y = x W + scale (x A) B      A [inputs, r], B [r, outputs]; arXiv 2106.09685, section 4.1

A product that is split over its outputs (``column``) has A whole and B split as W is, one that is split over its inputs
(``row``) A split and B whole. What is Partial over tp then is what x W, or its gradient, is anyway, so no collective is
added; the factor that tp does not split has a gradient that is Partial over tp, as all that tp does not split:

    column    x A [T, r]            dB = scale (x A)^T dy        d(x A) = scale dy B^T   P     dA = x^T d(x A)   P
    row       x A [T, r]   P        dB = scale (x A)^T dz   P    d(x A) = scale dz B^T         dA = x^T d(x A)

``P``: Partial over tp. The products of one rank's x with an unsplit A are alike on all ranks of tp.
"""

from __future__ import annotations

from ..ir.builder import Builder
from ..ir.records import Buffer

RANK = "r"  # the label of the dim between the factors: no product of a block has it


class Factors:
    """A and B of the product that ``signature`` says, x and W to y; ``name``: what records are called after."""

    def __init__(self, b: Builder, down: Buffer, up: Buffer, scale: float, signature: str, name: str) -> None:
        self.b, self.down, self.up, self.scale, self.name = b, down, up, scale, name
        inputs, self.y = signature.split("->")
        self.x, w = inputs.split(",")
        self.w_inputs = "".join(label for label in w if label in self.x)
        self.w_outputs = "".join(label for label in w if label not in self.x)
        free = "".join(label for label in self.x if label not in w)
        self.low = free + RANK

    def forward(self, x: Buffer, add_to: Buffer | None = None) -> Buffer:
        """Scale (x A) B, added in place to x W where that is given, and then in its role."""
        b, name = self.b, self.name
        (self.low_x,) = b.op(
            "matmul", [x, self.down], f"{name}_low", signature=f"{self.x},{self.w_inputs}{RANK}->{self.low}"
        )
        labels = f"{self.low}->{self.low}"
        (self.scaled,) = b.op("scale", [self.low_x], f"{name}_scaled", signature=labels, factor=self.scale)
        (self.made,) = b.op(
            "matmul",
            [self.scaled, self.up],
            f"{name}_adapted",
            signature=f"{self.low},{RANK}{self.w_outputs}->{self.y}",
            add_to=add_to,
            role=add_to.role if add_to else None,
        )
        return self.made

    def backward(
        self, dy: Buffer, x: Buffer, ddown: Buffer, dup: Buffer, add_to: Buffer | None = None
    ) -> Buffer | None:
        """Gradients of A and B into their places; returns that of x, added to ``add_to``; None where x needs none."""
        b, name = self.b, self.name
        up, down, labels = f"{RANK}{self.w_outputs}", f"{self.w_inputs}{RANK}", f"{self.low}->{self.low}"
        of = b.producer(self.made)
        facts = {"of": of, "gradient": dy}
        b.op(
            "matmul",
            [self.scaled, dy],
            f"d{name}_up",
            signature=f"{self.low},{self.y}->{up}",
            into={0: dup},
            dtypes=dup.dtype,
            wrt={0: 1},
            **facts,
        )
        signature = f"{self.y},{up}->{self.low}"
        (dscaled,) = b.op("matmul", [dy, self.up], f"d{name}_scaled", signature=signature, wrt={0: 0}, **facts)
        facts = {"of": b.producer(self.scaled), "gradient": dscaled}
        (dlow,) = b.op("scale", [dscaled], f"d{name}_low", signature=labels, factor=self.scale, wrt={0: 0}, **facts)
        facts = {"of": b.producer(self.low_x), "gradient": dlow}
        b.op(
            "matmul",
            [x, dlow],
            f"d{name}_down",
            signature=f"{self.x},{self.low}->{down}",
            into={0: ddown},
            dtypes=ddown.dtype,
            wrt={0: 1},
            **facts,
        )
        if not b.needs_gradient(x):
            return None
        signature = f"{self.low},{down}->{self.x}"
        kept = {"add_to": add_to, "dtypes": add_to.dtype if add_to else dy.dtype, "wrt": {0: 0}}
        return b.op("matmul", [dlow, self.down], f"d{name}_input", signature=signature, **kept, **facts)[0]
