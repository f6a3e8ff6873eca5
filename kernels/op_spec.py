"""What a row of the op table says (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .counts import NONE, ONE, Measure, Operands
from .signature import parse


@dataclass(frozen=True)
class OpSpec:
    """What holds for every record of one kind. Counts are of one rank, from its local shapes.

    signature    input and output labels; None: each record brings its own in ``attrs["signature"]``
    linear       groups of inputs in which the op is (jointly) linear: where a Partial may enter
    whole        labels that no axis may split
    in_place     {output: input}: the output is the input's storage, updated
    fresh        it fills parts of its input, of which nothing need be written yet
    statistics   outputs that only backward needs; they may go unread in a forward program
    adds         the record may carry one more, last, input that is added into output 0 in place
    law          what sets its time: bytes of memory, or the FLOPs of matrix products, which run on tensor cores
    backward     it differentiates another op; of products that is a record's to say
    leaves_sms   leaves ``plan.sm_margin`` SMs to communication: its kernels would hold every SM from start to end. The
                 others run blocks that end soon and make room
    flops        floating-point results; of an op of matrix products theirs alone, 2 per multiply-add
    bytes        that it must move: what it reads of its inputs and writes of its outputs; None: all of them, once
    kernels      of the plain form, as torch runs it under policy bf16
    plain_bytes  that these kernels read and write; None: one kernel, that moves no more than it must
    workspace    bytes that the CPU implementation may allocate besides its outputs, an upper bound
    counted      attributes of the record that these counts read; all else follows from shapes and dtypes
    """

    signature: str | None
    linear: tuple[tuple[int, ...], ...] = ()
    whole: str = ""
    in_place: dict[int, int] = field(default_factory=dict)
    fresh: bool = False
    statistics: tuple[int, ...] = ()
    adds: bool = False
    law: Literal["memory", "matmul", "attention"] = "memory"
    backward: bool = False
    leaves_sms: bool = False
    flops: Measure = NONE
    bytes: Measure | None = None
    kernels: Measure = ONE
    plain_bytes: Measure | None = None
    workspace: Measure = NONE
    counted: tuple[str, ...] = ()

    @property
    def is_product(self) -> bool:
        """Its FLOPs run on tensor cores and count in MFU and HFU."""
        return self.law != "memory"

    @property
    def token_local(self) -> bool:
        """A token's outputs follow from that token of its inputs and from no other; of products a record's to say."""
        if self.signature is None or self.is_product:
            return False
        signature = parse(self.signature)
        return all("t" in labels for labels in (signature.inputs[0], *signature.outputs))

    def flops_of(self, o: Operands) -> int:
        """With what an addition into output 0 takes: one more of each element, unless a product sums it up anyway."""
        return self.flops(o) + (o.outputs[0].elements if o.adds and not self.is_product else 0)

    def bytes_of(self, o: Operands) -> int:
        return o.all_bytes if self.bytes is None else self.bytes(o)

    def plain_bytes_of(self, o: Operands) -> int:
        if self.plain_bytes is None:
            return self.bytes_of(o)
        return self.plain_bytes(o) + (o.outputs[0].bytes if o.adds else 0)
