"""Plan: everything that decides how a step is run, and its legality (torch-free).

A plan is frozen, printable and round-trips through YAML. Whatever is illegal is refused with the rule and its numbers
before any tensor exists.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import yaml

from ...errors import CinemeshError

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
NCCL_CTAS = 64  # thread blocks of one collective at most: MAXCHANNELS in NCCL's src/include/device.h (2.22 and later)

DtypePolicy = Literal["bf16", "float32", "float64"]


@dataclass(frozen=True)
class Plan:
    """Degrees of the four mesh axes and how a step is run on them.

    ``recompute`` is one of ``none``, ``selective``, ``full`` or an explicit tuple of the activations that are kept
    (names inside a block, see ``rematerialize.KEPT``). The last ``last_blocks`` blocks follow ``recompute_last``
    instead. ``order`` lists the axes innermost (neighbouring ranks) first.

    Overlap; what is asked for and cannot happen is refused:

    prefetch                gathered units that live at once: at most ``prefetch`` + 1
    grad_units              unit gradients that live at once: with 2, one is reduced while the next is computed; the
                            sum over replicas then goes unit by unit as well, behind compute
    kv_slices               head slices in which K and V are gathered over cp, the next while attention runs on this
                            one; in backward their gradients are reduce-scattered likewise. At most two live at once.
                            Backward gathers again, unless ``recompute`` keeps ``kv_gathered``
    kv_chunks               token chunks in which K and V are gathered instead: attention runs on one chunk of the keys
                            after the other, the results are merged. Instead of ``kv_slices``
    kv_first                gathers of units wait until all of K and V is on its way: both cross the same links, and
                            attention needs K and V first. All parts of K and V then live at once
    tp_slices               token slices of every gather + matmul and matmul + reduce-scatter over tp
    fused_tp                these pairs as one record each, pipelined rank by rank; on CUDA by torch's symmetric memory,
                            private in torch 2.13, within one server (``fuse_tp.py``). Instead of ``tp_slices``
    defer_weight_gradients  weight gradients, and what is made again, may move into the shadow of communication

    How communication and compute share a GPU (``unit``: gathers and reductions over dp_shard * cp). They change no
    record of a step and no result, only its time; without NCCL they are without effect, and said to be:

    tp_ctas, cp_ctas, unit_ctas   thread blocks, each on an SM of its own, of every collective there; 0: NCCL's choice
    sm_margin                     SMs that matmuls and self-attention leave to communication
    normal_priority               of tp, cp, unit: streams that do not go before compute, as the others do
    """

    tp: int = 1
    cp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1
    micro_batches: int = 1
    recompute: str | tuple[str, ...] = "selective"
    dtype: DtypePolicy = "bf16"
    order: tuple[str, ...] = field(default=AXES)
    prefetch: int = 1
    grad_units: int = 1
    kv_slices: int = 1
    kv_chunks: int = 1
    kv_first: bool = False
    tp_slices: int = 1
    fused_tp: bool = False
    defer_weight_gradients: bool = False
    tp_ctas: int = 0
    cp_ctas: int = 0
    unit_ctas: int = 0
    sm_margin: int = 0
    normal_priority: tuple[str, ...] = ()
    recompute_last: str | tuple[str, ...] | None = None
    last_blocks: int = 0

    def __post_init__(self) -> None:
        counts = dict.fromkeys((*AXES, "micro_batches", "grad_units", "kv_slices", "kv_chunks", "tp_slices"), 1)
        counts |= dict.fromkeys(("prefetch", "last_blocks", "tp_ctas", "cp_ctas", "unit_ctas", "sm_margin"), 0)
        for name, least in counts.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CinemeshError(
                    f"plan: {name} is {value!r}", remedy=f"it must be a whole number of at least {least}"
                )
        for name in ("defer_weight_gradients", "fused_tp", "kv_first"):
            if not isinstance(value := getattr(self, name), bool):
                raise CinemeshError(f"plan: {name} is {value!r}", remedy="it must be true or false")
        if self.dtype not in DTYPES:
            raise CinemeshError(f"plan: dtype is {self.dtype!r}", remedy=f"choose one of {', '.join(DTYPES)}")
        if sorted(self.order) != sorted(AXES):
            raise CinemeshError(
                f"plan: order is {list(self.order)}", remedy=f"it must name each of {', '.join(AXES)} once"
            )
        for name in ("recompute", "recompute_last"):
            value = getattr(self, name)
            if isinstance(value, str) and value not in RECOMPUTE:
                raise CinemeshError(
                    f"plan: {name} is {value!r}",
                    remedy=f"choose one of {', '.join(RECOMPUTE)}, or list the activations to keep",
                )
        if (self.recompute_last is None) != (self.last_blocks == 0):
            raise CinemeshError(
                f"plan: recompute_last is {self.recompute_last!r} for last_blocks({self.last_blocks})",
                remedy="give both",
            )
        self._check_overlap()
        self._check_streams()

    def _check_overlap(self) -> None:
        """Refuse an overlap that cannot happen under these degrees."""
        asked = (
            (
                "grad_units",
                self.grad_units > 1,
                ("dp_shard", "cp", "dp_replicate"),
                "unit gradients are reduced over dp_shard * cp and summed over dp_replicate",
            ),
            ("kv_slices", self.kv_slices > 1, ("cp",), "K and V are gathered over cp"),
            ("kv_chunks", self.kv_chunks > 1, ("cp",), "K and V are gathered over cp"),
            ("kv_first", self.kv_first, ("cp",), "K and V are gathered over cp"),
            ("tp_slices", self.tp_slices > 1, ("tp",), "activations are gathered and scattered over tp"),
            ("fused_tp", self.fused_tp, ("tp",), "activations are gathered and scattered over tp"),
            (
                "defer_weight_gradients",
                self.defer_weight_gradients,
                ("tp", "cp"),
                "a block communicates over tp and cp",
            ),
        )
        for name, wanted, axes, rule in asked:
            if wanted and self.size(axes) == 1:
                degrees = ", ".join(f"{axis}(1)" for axis in axes)
                value, off = getattr(self, name), "false" if isinstance(getattr(self, name), bool) else 1
                raise CinemeshError(
                    f"plan: {name}({str(value).lower()}) with {degrees}: {rule}, so nothing would overlap",
                    remedy=f"set {name} to {off} or raise {' or '.join(axes)}",
                )
        slices, chunks = self.kv_slices, self.kv_chunks
        if slices > 1 and chunks > 1:
            raise CinemeshError(
                f"plan: kv_slices({slices}) with kv_chunks({chunks}): K and V travel by heads or by tokens",
                remedy="set one of them to 1",
            )
        if self.fused_tp and self.tp_slices > 1:
            raise CinemeshError(
                f"plan: fused_tp(true) with tp_slices({self.tp_slices}): both hide the same collectives over tp",
                remedy="set fused_tp to false or tp_slices to 1",
            )

    def _check_streams(self) -> None:
        """Refuse thread blocks, priorities and a margin for communication that there is not."""
        if not self.sets_streams:
            return
        if not isinstance(self.normal_priority, tuple) or len({*self.normal_priority}) < len(self.normal_priority):
            raise CinemeshError(
                f"plan: normal_priority is {self.normal_priority!r}",
                remedy=f"list some of {', '.join(STREAMS)}, each once",
            )
        for name in self.normal_priority:
            if name not in STREAMS:
                raise CinemeshError(f"plan: normal_priority names {name!r}", remedy=f"choose from {', '.join(STREAMS)}")
        for name, axes in STREAMS.items():
            ctas, low = self.ctas(axes), not self.high_priority(axes)
            if ctas > NCCL_CTAS:
                raise CinemeshError(
                    f"plan: {name}_ctas({ctas}) > {NCCL_CTAS}, the thread blocks that NCCL gives a collective at most",
                    remedy=f"use {NCCL_CTAS} or fewer, or 0 for NCCL's own choice",
                )
            if (ctas or low) and self.size(axes) == 1:
                asked = f"{name}_ctas({ctas})" if ctas else f"normal_priority({name})"
                remedy = f"set {name}_ctas to 0" if ctas else f"take {name} out of normal_priority"
                degrees = ", ".join(f"{axis}(1)" for axis in axes)
                raise CinemeshError(
                    f"plan: {asked} with {degrees}: one rank has no collective there, so nothing would change",
                    remedy=f"{remedy} or raise {' or '.join(axes)}",
                )
        if self.sm_margin and self.world_size == 1:
            raise CinemeshError(
                f"plan: sm_margin({self.sm_margin}) with {self.equation()}: one rank does not communicate, so the SMs "
                "would only idle",
                remedy="set sm_margin to 0 or raise a degree",
            )

    def check_device(self, name: str, sms: int) -> None:
        """Refuse more thread blocks than a GPU of ``sms`` SMs can hold beside compute, and a margin of all of them."""
        if not self.sets_streams:
            return
        taken = {"sm_margin": self.sm_margin} | {f"{group}_ctas": self.ctas(axes) for group, axes in STREAMS.items()}
        for knob, taking in taken.items():
            if taking >= sms:
                raise CinemeshError(
                    f"plan: {knob}({taking}) leaves none of the {sms} SMs of {name} to compute",
                    remedy=f"use {sms - 1} or fewer",
                )

    @property
    def sets_streams(self) -> bool:
        """Whether anything differs from NCCL's own thread blocks, all SMs for compute, priority for all streams."""
        return bool(self.tp_ctas or self.cp_ctas or self.unit_ctas or self.sm_margin or self.normal_priority != ())

    @property
    def streams(self) -> list[str]:
        """What is set of them, as it is written: ``["tp_ctas=8"]``."""
        names = (*(f"{name}_ctas" for name in STREAMS), "sm_margin")
        said = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name)]
        return [*said, f"normal_priority={':'.join(self.normal_priority)}"] if self.normal_priority else said

    def ctas(self, axes: tuple[str, ...]) -> int:
        """Thread blocks of a collective over ``axes``; 0: NCCL's own choice."""
        return next((getattr(self, f"{name}_ctas") for name, group in STREAMS.items() if group == axes), 0)

    def high_priority(self, axes: tuple[str, ...]) -> bool:
        """Whether collectives over ``axes`` go before compute that waits for SMs."""
        return not any(STREAMS[name] == axes for name in self.normal_priority)

    @property
    def overlaps(self) -> bool:
        """Whether an overlap is asked for that needs the schedule pass."""
        sliced = max(self.grad_units, self.kv_slices, self.kv_chunks, self.tp_slices) > 1
        return sliced or self.kv_first or self.defer_weight_gradients

    def with_degrees(self, **degrees: int) -> Plan:
        """The same plan on other degrees, less the overlaps, thread blocks and priorities that cannot be there."""
        size = {axis: degrees.get(axis, self.size(axis)) for axis in AXES}
        changed: dict[str, Any] = dict(degrees)
        if self.sets_streams:
            alone = {name for name, axes in STREAMS.items() if all(size[axis] == 1 for axis in axes)}
            changed |= {f"{name}_ctas": 0 for name in alone}
            changed["normal_priority"] = tuple(name for name in self.normal_priority if name not in alone)
            changed["sm_margin"] = self.sm_margin if math.prod(size.values()) > 1 else 0
        return replace(
            self,
            **changed,
            grad_units=self.grad_units if size["dp_shard"] * size["cp"] * size["dp_replicate"] > 1 else 1,
            kv_slices=self.kv_slices if size["cp"] > 1 else 1,
            kv_chunks=self.kv_chunks if size["cp"] > 1 else 1,
            kv_first=self.kv_first and size["cp"] > 1,
            tp_slices=self.tp_slices if size["tp"] > 1 else 1,
            fused_tp=self.fused_tp and size["tp"] > 1,
            defer_weight_gradients=self.defer_weight_gradients and size["tp"] * size["cp"] > 1,
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp_shard * self.dp_replicate

    @property
    def data_ranks(self) -> int:
        """Ranks that hold different samples."""
        return self.dp_shard * self.dp_replicate

    @property
    def compute_dtype(self) -> str:
        return DTYPES[self.dtype][0]

    @property
    def stat_dtype(self) -> str:
        return DTYPES[self.dtype][1]

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

    def check_model(self, *, heads: int, ffn: int, tokens: int, text_widths: dict[str, int], latent: str) -> None:
        """Refuse a model or a sample that the degrees do not divide."""

        def divides(size: str, what: str, value: int, by: str, degree: int, remedy: str) -> None:
            if value % degree:
                rule = f"{what}({value}) % {by} = {value % degree}, it must be 0"
                raise CinemeshError(rule, remedy=remedy, what=size, value=value, rule=rule)

        divides("heads", "heads", heads, f"tp({self.tp})", self.tp, "choose a tp that divides the heads")
        divides("ffn", "ffn", ffn, f"tp({self.tp})", self.tp, "choose a tp that divides the FFN width")
        for name, width in text_widths.items():
            encoder = f"width of text encoder {name}"
            divides("text", encoder, width, f"tp({self.tp})", self.tp, "choose a tp that divides it")
        parts = self.cp * self.tp
        divides(
            "tokens",
            f"tokens of a {latent} latent",
            tokens,
            f"(cp({self.cp}) * tp({self.tp}) = {parts})",
            parts,
            "choose degrees whose product divides the tokens, or another latent",
        )
        divides(
            "heads",
            "heads of one rank",
            heads // self.tp,
            f"kv_slices({self.kv_slices})",
            self.kv_slices,
            f"choose a kv_slices that divides heads({heads}) / tp({self.tp})",
        )
        divides(
            "tokens",
            "tokens of one cp rank",
            tokens // self.cp,
            f"kv_chunks({self.kv_chunks})",
            self.kv_chunks,
            f"choose a kv_chunks that divides tokens({tokens}) / cp({self.cp})",
        )
        divides(
            "tokens",
            "tokens of one rank",
            tokens // parts,
            f"tp_slices({self.tp_slices})",
            self.tp_slices,
            f"choose a tp_slices that divides tokens({tokens}) / (cp({self.cp}) * tp({self.tp}))",
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

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise CinemeshError(f"plan: unknown key {name!r}{hint} Known keys: {', '.join(sorted(known))}")
        listed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**listed)

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        try:
            values = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise CinemeshError(f"plan: not valid YAML ({error})", remedy="write one 'key: value' a line") from None
        if not isinstance(values, dict):
            raise CinemeshError("plan: the file holds no mapping", remedy="write one 'key: value' a line")
        return cls.from_dict(values)

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> Plan:
        """From the command line: ``tp=4,cp=2,dp_shard=96``; later keys override ``defaults``."""
        values: dict[str, Any] = dict(defaults)
        for item in filter(None, text.split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise CinemeshError(
                    f"plan: {item!r} is not key=value", remedy="write for example tp=4,cp=2,dp_shard=96"
                )
            key, value = key.strip(), value.strip()
            if key in ("order", "normal_priority") or (key in ("recompute", "recompute_last") and ":" in value):
                values[key] = tuple(filter(None, value.split(":")))  # "o:" is a list of one
            elif value in ("true", "false"):
                values[key] = value == "true"
            else:
                values[key] = int(value) if value.lstrip("-").isdigit() else value
        return cls.from_dict(values)
