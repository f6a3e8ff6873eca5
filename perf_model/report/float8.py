"""What fp8 linear layers would give a plan: its own records with other prices, played (torch-free).

Nothing here runs in fp8. The products of the blocks are priced by the cluster's law of matmuls at its fp8 rates, whose
origins ``rates`` tells; their factors are cast as other trainers do (``published/peer_block.py``), by kernels of their
own: an activation or a gradient once, before the first product that reads it, as it is and transposed; a weight, if it
is scaled by row, at every use, else before it is gathered. Attention, and all that travels, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import CinemeshError
from ...parallel.ir.program import Program
from ...parallel.ir.records import Holds, Op
from ..clusters.cluster import Cluster
from ..clusters.constants import Fact
from ..prices.compute import Compute, OpPrice
from ..prices.network import Network
from ..prices.played import PlayedStep
from ..prices.timeline import play, price
from ..published.peer_block import FP8_CAST

FLOAT8 = "float8"
RATES = ("gpu.peak_flops", "gpu.sustained", "matmul.efficiency")
SCALINGS = {"tensor": "one scale a tensor", "row": "one scale a row"}


@dataclass(frozen=True)
class Float8:
    """The step of a plan whose blocks multiply in fp8.

    ``linear_s``: seconds of these products now; ``float8_s``, ``cast_s``: in fp8, and of the casts to it. ``gain``:
    samples/s more, relative. ``rates``: where the fp8 rates come from. ``problem``: why there is none.
    """

    name: str
    runs: bool
    linear_s: float = 0.0
    float8_s: float = 0.0
    cast_s: float = 0.0
    step_s: float = 0.0
    gain: float = 0.0
    rates: str = ""
    problem: str = ""


def float8(whole: PlayedStep, cluster: Cluster) -> list[Float8]:
    """With each way to scale; one that says why not where the cluster's GPU or the plan's dtype has no fp8."""
    if whole.plan.compute_dtype != "bfloat16":
        return [Float8("fp8 linear layers", False, problem=f"the plan computes in {whole.plan.compute_dtype}")]
    try:
        return [_priced(whole, cluster, scaling) for scaling in FP8_CAST]
    except CinemeshError as error:  # a GPU without fp8
        return [Float8("fp8 linear layers", False, problem=error.problem)]


def _priced(whole: PlayedStep, cluster: Cluster, scaling: str) -> Float8:
    program = whole.program
    before, after = Compute(cluster), _Float8Compute(cluster, program, scaling)
    timeline = play(price(program, after, Network(cluster), cluster))
    step_s = whole.played_as(timeline, cluster)
    products = [part for op in program.ops for part in op.parts if _is_linear(part)]
    casts_s = sum(after.cast_s(part) for part in products)
    return Float8(
        f"fp8 linear layers, {SCALINGS[scaling]}",
        runs=False,
        linear_s=sum(before.op_s(program, part) for part in products),
        float8_s=sum(after.op_s(program, part) for part in products) - casts_s,
        cast_s=casts_s,
        step_s=step_s,
        gain=whole.step_s / step_s - 1.0,
        rates="; ".join(f"{name} {_told(cluster.facts[name])}" for name in RATES),
    )


def _told(fact: Fact) -> str:
    unit = "" if fact.unit == "fraction" else f" {fact.unit}"
    return f"{fact.value[FLOAT8]}{unit} ({fact.origin}: {fact.source}, {fact.date})"


def _is_linear(op: Op) -> bool:
    """A product of a block: embeddings, the head and what all blocks share stay as they are."""
    return op.kind == "matmul" and op.place.block is not None


class _Float8Compute(Compute):
    """Prices the linear layers of one program in fp8, with the casts that come before them."""

    def __init__(self, cluster: Cluster, program: Program, scaling: str) -> None:
        super().__init__(cluster)
        (_, _), (self._cast_bytes, self._cast_kernels) = FP8_CAST[scaling]
        self._casts: dict[str, list[int]] = {}  # elements that a product casts, by its name
        known: set[str] = set()
        for op in (part for record in program.ops for part in record.parts if _is_linear(part)):
            cast = self._casts[op.name] = list[int]()
            for name in op.inputs[:2]:
                weight = program.buffers[program.root(name)[0]].holds is not Holds.VALUES
                if (scaling == "row") if weight else name not in known:
                    cast.append(program.local_elements(name))
                known.add(name)

    def cast_s(self, op: Op) -> float:
        """Seconds of the casts before a product."""
        floors_s = (self._cast_kernels - 1) * self.cluster.stream.floor_s
        return sum(self.stream_s(elements * self._cast_bytes) + floors_s for elements in self._casts[op.name])

    def price(self, program: Program, op: Op) -> OpPrice:
        """Of a linear layer in fp8; of others as they are."""
        if not _is_linear(op):
            return super().price(program, op)
        priced = self.product(program, op, FLOAT8, self.margin(program, op))
        return replace(priced, kernel_s=priced.kernel_s + self.cast_s(op))
