"""The fields of a plan, in four groups: degrees, memory, overlap, streams (torch-free).

Each is declared with its knob (``knobs.py``), which says all there is to say of it. A new one is added here, and read
where it acts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

from ...errors import CinemeshError
from .knobs import Activations, Divides, Kept, KnobGroup, OneOf, Order, SomeOf, Switch, Whole, knob, knobs, written

AXES = ("tp", "cp", "dp_shard", "dp_replicate")
DTYPES: dict[str, tuple[str, str]] = {
    # policy: (compute dtype, dtype of statistics, reductions of shared gradients, master weights and moments)
    "bf16": ("bfloat16", "float32"),
    "float32": ("float32", "float32"),
    "float64": ("float64", "float64"),
}
RECOMPUTE = ("none", "selective", "full")

# Communicators whose thread blocks and stream priority a plan may set: name -> axes. Gathers and reductions of units
# have a communicator each, and one setting.
STREAMS: dict[str, tuple[str, ...]] = {"tp": ("tp",), "cp": ("cp",), "unit": ("dp_shard", "cp")}

DtypePolicy = Literal["bf16", "float32", "float64"]

MOST_BLOCKS = 1024  # of a model
MOST_RANKS, NO_CLUSTER = 2**24, "more ranks than any cluster has GPUs"
_ranks = partial(Whole, least=1, most=MOST_RANKS, why=NO_CLUSTER)
_units = partial(Whole, most=MOST_BLOCKS, why="more units than any model has: one a block")
_parts = partial(Whole, least=1, most=1024, why="more parts of an exchange than can pay: each is a collective")
_ctas = partial(
    Whole,
    does="thread blocks, each on an SM of its own, of every collective there. Fewer leave more SMs to compute and "
    "carry fewer bytes a second; 0 is NCCL's own choice",
    least=0,
    most=64,  # MAXCHANNELS in NCCL's src/include/device.h (2.22 and later)
    why="the thread blocks that NCCL gives a collective at most",
    of_sms=True,
    rule="one rank has no collective there",
    idle="nothing would change",
)
OVER_CP = "K and V are gathered over cp"
OVER_TP = "activations are gathered and scattered over tp"


@dataclass(frozen=True)
class Degrees(KnobGroup):
    """How many ranks there are, what each is given, and how they lie beside each other."""

    tp: int = knob(
        1,
        _ranks(
            does="ranks that share heads, FFN columns and, where layers work token by token, tokens",
            divides=(
                Divides("heads", ("tp",), remedy="choose a tp that divides the heads"),
                Divides("ffn", ("tp",), remedy="choose a tp that divides the FFN width"),
                Divides("text", ("tp",), remedy="choose a tp that divides it"),
            ),
        ),
    )
    cp: int = knob(
        1,
        _ranks(
            does="ranks that share the tokens of a sample; K and V are gathered over them",
            divides=(
                Divides(
                    "tokens",
                    ("cp", "tp"),
                    remedy="choose degrees whose product divides the tokens, or another latent",
                ),
            ),
        ),
    )
    dp_shard: int = knob(1, _ranks(does="ranks with samples of their own that share the parameters, with cp"))
    dp_replicate: int = knob(1, _ranks(does="groups of such ranks, each with all parameters"))
    micro_batches: int = knob(
        1,
        Whole(
            does="forward and backward passes of one update", least=1, most=2**20, why="more samples than any step has"
        ),
    )
    order: tuple[str, ...] = knob(AXES, Order(does="the axes, innermost (neighbouring ranks) first", words=AXES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size > MOST_RANKS:
            raise CinemeshError(
                f"plan: {self.equation()} > {MOST_RANKS}, {NO_CLUSTER}", remedy="lower a degree", what="world size"
            )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp_shard * self.dp_replicate

    @property
    def data_ranks(self) -> int:
        """Ranks that hold different samples."""
        return self.dp_shard * self.dp_replicate

    def size(self, axes: str | tuple[str, ...]) -> int:
        """Number of ranks along one axis or a group of axes."""
        names = (axes,) if isinstance(axes, str) else axes
        return math.prod([cast(int, getattr(self, axis)) for axis in names])

    def equation(self) -> str:
        """The degrees with their product, for errors: ``tp(4) * cp(2) * dp_shard(96) = 768``."""
        shown = [f"{axis}({self.size(axis)})" for axis in AXES if axis != "dp_replicate" or self.dp_replicate > 1]
        return f"{' * '.join(shown)} = {self.world_size}"

    def check_world_size(self, world_size: int) -> None:
        if self.world_size != world_size:
            raise CinemeshError(
                f"{self.equation()} != world size {world_size}",
                remedy=f"change the plan's degrees or launch {self.world_size} processes",
            )

    def local_batch(self, global_batch: int) -> int:
        """Samples of one data rank in one micro-batch."""
        parts = self.data_ranks * self.micro_batches
        if global_batch < 1 or global_batch % parts:
            raise CinemeshError(
                f"global batch({global_batch}) % (dp_shard({self.dp_shard}) * dp_replicate({self.dp_replicate}) * "
                f"micro_batches({self.micro_batches}) = {parts}) = {global_batch % parts}, it must be 0 and the batch "
                f"at least {parts}",
                remedy=f"use a multiple of {parts}",
            )
        return global_batch // parts


@dataclass(frozen=True)
class Memory(KnobGroup):
    """How values are stored, and which of them live from forward to backward. The last blocks may keep others."""

    dtype: DtypePolicy = knob("bf16", OneOf(does="how a step computes and what its states are", words=tuple(DTYPES)))
    recompute: str | tuple[str, ...] = knob(
        "selective",
        Kept(
            does="which activations of a block are made again in backward, or the list of those that are kept. Keeping "
            "`kv_gathered` spares backward the second gather of K and V",
            words=RECOMPUTE,
            off="none",
        ),
    )
    recompute_last: str | tuple[str, ...] | None = knob(
        None, Kept(does="the same, of the last `last_blocks` blocks", words=RECOMPUTE, optional=True)
    )
    last_blocks: int = knob(0, _units(does="how many blocks follow `recompute_last`", least=0))
    offload: tuple[str, ...] = knob(
        (),
        Activations(
            does="activations that live in host memory from forward to backward, of all blocks but the last one and "
            "those of `last_blocks`. Their copies run beside the block that is computed meanwhile",
            bound="on the device, what one block keeps of them",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recompute_last is None) != (self.last_blocks == 0):
            raise CinemeshError(
                f"plan: recompute_last is {self.recompute_last!r} for last_blocks({self.last_blocks})",
                remedy="give both",
                what="recompute_last",
                value=self.recompute_last,
            )

    @property
    def compute_dtype(self) -> str:
        return DTYPES[self.dtype][0]

    @property
    def stat_dtype(self) -> str:
        return DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Overlap(KnobGroup):
    """What runs beside what. What is asked for and cannot happen is refused, never ignored."""

    grad_units: int = knob(
        1,
        _units(
            does="a unit's gradient is reduced while the next units' backward runs; its sum over replicas follows, "
            "unit by unit, instead of one over everything at the end",
            bound="at most `grad_units` unit gradients",
            axes=("dp_shard", "cp", "dp_replicate"),
            rule="unit gradients are reduced over dp_shard * cp and summed over dp_replicate",
            least=1,
            reorders=True,
        ),
    )
    kv_slices: int = knob(
        1,
        _parts(
            does="K and V are gathered in head slices, the next while attention runs on this one; in backward dK and "
            "dV of one slice are reduce-scattered while the next is computed. Backward gathers again, unless "
            "`recompute` keeps `kv_gathered`",
            bound="two gathered slices",
            excludes={"kv_chunks": "K and V travel by heads or by tokens"},
            divides=(Divides("heads", ("kv_slices",), after=("tp",), share="heads of one rank"),),
            reorders=True,
            tries=(2, 3, 4, 6, 12),
            axes=("cp",),
            rule=OVER_CP,
        ),
    )
    kv_chunks: int = knob(
        1,
        _parts(
            does="K and V are gathered in token chunks instead: attention runs on one chunk of the keys after the "
            "other, with all heads, and the results are merged by their log-sum-exp; in backward dK and dV of a chunk "
            "are whole, dq is summed over the chunks",
            bound="two gathered chunks",
            divides=(Divides("tokens", ("kv_chunks",), after=("cp",), share="tokens of one cp rank"),),
            reorders=True,
            tries=(2, 3, 4, 6, 9),
            tried_with=("kv_first",),
            axes=("cp",),
            rule=OVER_CP,
        ),
    )
    kv_first: bool = knob(
        False,
        Switch(
            does="gathers of units wait until all of K and V is on its way: both cross the same links, and attention "
            "needs K and V first",
            bound="all parts of K and V live at once",
            reorders=True,
            tries=(False, True),
            axes=("cp",),
            rule=OVER_CP,
        ),
    )
    tp_slices: int = knob(
        1,
        _parts(
            does="every gather + product and product + reduce-scatter over tp moves in token slices",
            divides=(Divides("tokens", ("tp_slices",), after=("cp", "tp"), share="tokens of one rank"),),
            reorders=True,
            tries=(2, 3, 4, 8),
            axes=("tp",),
            rule=OVER_TP,
        ),
    )
    fused_tp: bool = knob(
        False,
        Switch(
            does="each of these pairs is one record instead, pipelined rank by rank: the parts of a gather arrive "
            "while others are multiplied. On CUDA by torch's symmetric memory, which is private in torch 2.13 "
            "(`parallel/passes/fuse_tp.py`); off unless asked for by hand",
            bound="one server",
            excludes={"tp_slices": "both hide the same collectives over tp"},
            axes=("tp",),
            rule=OVER_TP,
        ),
    )
    defer_weight_gradients: bool = knob(
        False,
        Switch(
            does="weight gradients, and what backward makes again, run where compute would wait",
            bound="no more memory than in the builder's order",
            axes=("tp", "cp"),
            rule="a block communicates over tp and cp",
            reorders=True,
            tries=(True,),
        ),
    )
    prefetch: int = knob(
        1,
        _units(
            does="a unit is gathered while the units before it are computed",
            bound="at most `prefetch` + 1 gathered units",
            off=0,
            least=0,
            tries=(2,),
        ),
    )

    @property
    def overlaps(self) -> bool:
        """Whether an overlap is asked for that needs the schedule pass."""
        return any(facts.reorders and getattr(self, name) != facts.off for name, facts in knobs(Overlap).items())


@dataclass(frozen=True)
class Streams(KnobGroup):
    """How communication and compute share a GPU (``unit``: gathers and reductions over dp_shard * cp).

    These fields change no record of a step and no result, only its time; without NCCL they are without effect.
    """

    tp_ctas: int = knob(0, _ctas(axes=STREAMS["tp"], tries=(4, 8, 16)))
    cp_ctas: int = knob(0, _ctas(axes=STREAMS["cp"], tries=(4, 8, 16)))
    unit_ctas: int = knob(0, _ctas(axes=STREAMS["unit"], tries=(2, 4, 8)))
    sm_margin: int = knob(
        0,
        Whole(
            does="SMs that matmuls and self-attention leave to communication. Refused where a chosen kernel would take "
            "them all the same",
            axes=AXES,
            rule="one rank does not communicate",
            idle="the SMs would only idle",
            least=0,
            most=512,
            why="more SMs than any GPU has",
            of_sms=True,
            tries=(4, 8, 16),
        ),
    )
    normal_priority: tuple[str, ...] = knob(
        (),
        SomeOf(
            does="groups whose streams do not go before compute. A collective that becomes free to start while a "
            "kernel runs then starts behind it",
            groups=STREAMS,
            rule="one rank has no collective there",
            idle="nothing would change",
            tries=tuple((name,) for name in STREAMS),
        ),
    )

    @property
    def streams(self) -> list[str]:
        """What differs from NCCL's own thread blocks, all SMs for compute, priority for all: ``["tp_ctas=8"]``."""
        return written(self, knobs(Streams))

    def ctas(self, axes: tuple[str, ...]) -> int:
        """Thread blocks of a collective over ``axes``; 0: NCCL's own choice."""
        return next((getattr(self, f"{name}_ctas") for name, group in STREAMS.items() if group == axes), 0)

    def high_priority(self, axes: tuple[str, ...]) -> bool:
        """Whether collectives over ``axes`` go before compute that waits for SMs."""
        return not any(STREAMS[name] == axes for name in self.normal_priority)

    def check_device(self, name: str, sms: int) -> None:
        """Refuse more thread blocks than a GPU of ``sms`` SMs can hold beside compute, and a margin of all of them."""
        for knob_name, facts in knobs(Streams).items():
            value = getattr(self, knob_name)
            if isinstance(facts, Whole) and facts.of_sms and value >= sms:
                rule = f"{knob_name}({value}) leaves none of the {sms} SMs of {name} to compute"
                raise CinemeshError(
                    f"plan: {rule}", remedy=f"use {sms - 1} or fewer", what=knob_name, value=value, rule=rule
                )
