"""What other trainers ran: GPT and Llama training steps as tapes of priced records, for validation only (torch-free).

The records of a peer's step are priced by the same ``Compute`` and ``Network`` and played by the same ``timeline`` as
the programs of this project. What a software stack fused, recomputed, overlapped or sharded is stated by its
:class:`Stack` (``published/stacks.yaml``); nothing here knows the name of a source.

Letters: t local tokens, d width, f FFN width, h query heads, g key and value heads, K head dim, e bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from ..prices.compute import Compute
from ..prices.network import Cost, Network, group_of
from ..prices.timeline import COMPUTE, ISSUE, WAIT, Record, Tape, play

HALF = 2  # bytes of a bf16 or fp16 element
FLOAT = 4
# Host time of one kernel of an eager stack, s: the op, its module's Python and autograd; from the smallest steps that
# vTrain measured, which the host paces
EAGER_KERNEL_S = 4e-5


@dataclass(frozen=True)
class Stack:
    """What one source's software did, from its documentation.

    attention     kernel family of the cluster file, or ``unfused``: scores in memory, one fused softmax kernel
    eager         every kernel is dispatched by the host; False: compiled, fused or replayed
    fused         which of norm, rope, activation, residual, loss, optimizer, qkv, gate_up run as one kernel
    repeat_kv     keys and values are copied to all query heads before attention (and before any gather over cp)
    tp_overlap    none; wgrad: the gradient's reduction hides behind the weight gradient; pipelined: ring exchange in
                  chunks behind the products, only the first chunk exposed
    shard         fsdp: units gathered for use, gradients reduced every micro-batch; grad_op: as fsdp, gathered once a
                  micro-batch; zero1: optimizer sharded; ddp: replicas
    overlap_data  reductions and gathers of zero1 and ddp run behind backward and forward
    reduce_bytes  of a gradient element on the wire
    copies        of sharded units, in memory beside the collectives: fsdp1 gathers into the flat parameter, then
                  concatenates its gradients, casts and scales them; fsdp2 copies out of every gather and into every
                  reduction; none: flat buffers, nothing copied
    early_stop    recompute stops at the last activation that backward reads (the block's last product is not run again)
    whole_vocab   logits are gathered over tp and the loss is computed of all of them on every rank
    keeps_gathered  with sp, what was gathered for a product stays for its weight gradient
    metrics       cross entropies that training metrics make of all logits, unfused, after every backward
    cp_passes_gradients  where K and V are gathered over cp, their gradients go around the ranks, each adding its own
                  after every step, the last exposed; False: reduced at once when all are there
    assumed       the default: nothing is known of what the software did
    """

    name: str
    attention: str
    eager: bool
    fused: frozenset[str]
    shard: Literal["fsdp", "grad_op", "zero1", "ddp"]
    repeat_kv: bool = False
    tp_overlap: Literal["none", "wgrad", "pipelined"] = "none"
    overlap_data: bool = True
    reduce_bytes: int = HALF
    copies: Literal["none", "fsdp1", "fsdp2"] = "none"
    early_stop: bool = False
    whole_vocab: bool = False
    keeps_gathered: bool = False
    metrics: int = 0
    cp_passes_gradients: bool = False
    assumed: bool = False


@dataclass(frozen=True)
class Model:
    """A decoder. ``vocab`` 0: a row of one block, without ends.

    ``dropout``: on the residual branches, and on the probabilities of ``unfused`` attention.
    """

    layers: int
    width: int
    ffn: int
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    seq: int
    causal: bool = True
    tied: bool = False
    dropout: bool = False

    @property
    def qkv_columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def block_parameters(self) -> int:
        attention = self.width * (self.qkv_columns + self.heads * self.head_dim)
        return attention + (3 if self.gated else 2) * self.width * self.ffn + 2 * self.width

    @property
    def end_parameters(self) -> int:
        """Embedding, output head and final norm."""
        return (1 if self.tied else 2) * self.vocab * self.width + self.width


@dataclass(frozen=True)
class Run:
    """One training step of one row. ``recomputed``: the share of the blocks and the records that run again."""

    model: Model
    stack: Stack
    samples: int  # of a micro-batch
    micro_batches: int
    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_method: Literal["ring", "contiguous_ring", "gather", "all_to_all", "none"] = "none"
    shard: int = 1  # ranks that share one optimizer state (and, with fsdp, the weights), cp included
    replicas: int = 1
    recomputed: frozenset[str] = frozenset()
    recomputed_share: float = 1.0
    fp8: Literal["", "tensor", "row"] = ""  # scaled by tensor or by row
    fp8_gather: bool = False
    dtype: str = "bfloat16"
    tp_overlap: str = ""  # overrides the stack's where a row says so

    @property
    def tokens(self) -> int:
        """Tokens of one rank in one micro-batch, before tp splits them."""
        return self.samples * self.model.seq // self.cp

    @property
    def plan(self) -> Plan:
        """The mesh axes of this run, for the network's groups."""
        return Plan(tp=self.tp, cp=self.cp, dp_shard=self.shard // self.cp, dp_replicate=self.replicas)


@dataclass
class Recorder:
    """Appends priced records to a tape. Compute between two collectives is merged by what it needs (SMs or memory)."""

    run: Run
    compute: Compute
    network: Network
    cluster: Cluster
    records: list[Record] = field(default_factory=list)
    kernels: int = 0
    compute_s: float = 0.0

    def __post_init__(self) -> None:
        plan = self.run.plan
        self.groups = {
            "tp": group_of(self.cluster, plan, ("tp",)),
            "cp": group_of(self.cluster, plan, ("cp",)),
            "data": group_of(self.cluster, plan, ("dp_shard", "cp")),
            "replicas": group_of(self.cluster, plan, ("dp_replicate",)),
        }
        self.sizes = {"tp": plan.tp, "cp": plan.cp, "data": self.run.shard, "replicas": plan.dp_replicate}
        # Gathers and reductions of units have a communicator each: launched from streams of their own.
        names = ("tp", "cp", "data all_gather", "data reduce_scatter", "data all_reduce", "replicas")
        self.communicators = {name: i for i, name in enumerate(names)}
        self._open: list[Record | None] = [None, None]  # merged compute that is not yet on the tape

    def add(self, seconds: float, busy: bool, kernels: int = 1) -> None:
        self.kernels += kernels
        self.compute_s += seconds
        before = self._open[busy]
        self._open[busy] = Record(COMPUTE, seconds + (before.seconds if before else 0.0), busy)

    def flush(self) -> None:
        self.records += [record for record in self._open if record is not None]
        self._open = [None, None]

    def matmul(self, m: int, n: int, k: int, *, fp8: bool = False, accumulate: bool = False) -> None:
        dtype = "float8" if fp8 else self.run.dtype
        out = "float32" if accumulate else None
        self.add(self.compute.matmul_s(m, n, k, dtype, out_dtype=out, accumulate=accumulate), True)

    def stream(self, bytes_moved: float, kernels: int = 1) -> None:
        """Memory-bound kernels that move so many bytes together."""
        self.add(self.compute.stream_s(bytes_moved), False, kernels)

    def cost(self, kind: str, payload_bytes: float, axis: str) -> Cost:
        return self.network.collective(kind, round(payload_bytes), self.groups[axis])

    def issue(self, kind: str, payload_bytes: float, axis: str) -> int:
        """Returns the index to wait for; -1 for a group of one."""
        if self.sizes[axis] == 1:
            return -1
        self.flush()
        key = self.communicators[f"data {kind}" if axis == "data" else axis]
        self.records.append(Record(ISSUE, key=key, cost=self.cost(kind, payload_bytes, axis)))
        return len(self.records) - 1

    def wait(self, index: int) -> None:
        if index >= 0:
            self.flush()
            self.records.append(Record(WAIT, key=index))

    def host_bound(self, seconds: float, kernels: int) -> None:
        """Top up compute since (``seconds``, ``kernels``) to the time that the host needs to dispatch the kernels."""
        if self.run.stack.eager:
            needed = (self.kernels - kernels) * max(EAGER_KERNEL_S, self.cluster.launch.eager_s)
            self.add(max(needed - (self.compute_s - seconds), 0.0), False, 0)

    def play(self) -> float:
        self.flush()
        overlap = self.cluster.overlap
        tape = Tape(
            self.records,
            self.cluster.gpu.sms,
            self.cluster.gpu.memory_bytes_per_s,
            overlap.compute_slowdown,
            overlap.communication_slowdown,
        )
        return play(tape).step_s
