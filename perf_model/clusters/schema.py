"""What a cluster file says: its sections, and the number behind every name (torch-free)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from .constants import (
    Bytes,
    BytesOrZero,
    BytesPerSecond,
    BytesPerSecondTable,
    Duration,
    FlopsBySize,
    FlopsTable,
    Fraction,
    FractionBySize,
    FractionOrZero,
    FractionTable,
    LongTime,
    Ratio,
    Rule,
    Seconds,
    SecondsOrZero,
    SecondsTable,
    Watts,
    WholeCount,
    YamlTable,
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. ``sustained``: clock of a long step under its power limit over that of a short isolated kernel.

    ``device``: what the catalogue of kernels asks, ``cpu`` or a capability such as ``sm_90``.
    """

    name: str
    device: str
    sms: WholeCount
    power_w: Watts
    memory_bytes: Bytes
    memory_bytes_per_s: BytesPerSecond
    peak_flops: FlopsTable
    sustained: FractionTable


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """Law of a matmul (``compute.Compute.matmul_s``). ``efficiency``: of the peak, by dtype.

    ``grid``: a CSV beside the cluster file, m, n, k, ratio: measured time over the law's.
    """

    efficiency: FractionTable
    tile: WholeCount
    tail: FractionOrZero
    prologue_s: SecondsOrZero
    floor_s: Seconds
    memory_fraction: Fraction
    grid: str = ""


@dataclass(frozen=True, kw_only=True)
class PassConstants:
    """One attention kernel (``compute.attention_s``). ``speed`` by head dim: what a full chip reaches on long rows."""

    speed: FlopsBySize
    rows: WholeCount
    tail: FractionOrZero
    prologue_s: SecondsOrZero
    floor_s: Seconds


@dataclass(frozen=True, kw_only=True)
class AttentionFamily:
    """A family of attention kernels. ``ordered``: what is left of backward's speed with sums in one fixed order."""

    forward: PassConstants
    backward: PassConstants
    ordered: Fraction = 1.0


@dataclass(frozen=True, kw_only=True)
class StreamConstants:
    """Memory-bound kernels: ``floor_s`` + bytes / (``fraction`` of the memory's rate)."""

    fraction: Fraction
    floor_s: Seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Ops whose own time was measured, by name: ``floor_s`` + bytes / ``bytes_per_s``; others: ``StreamConstants``."""

    floor_s: SecondsTable
    bytes_per_s: BytesPerSecondTable


@dataclass(frozen=True, kw_only=True)
class LaunchConstants:
    """Host time of one kernel launched by torch, and the gap between two nodes of a replayed graph."""

    eager_s: Seconds
    graph_s: Seconds


@dataclass(frozen=True, kw_only=True)
class MemoryConstants:
    """What a process may allocate, and what the program does not own."""

    usable_bytes: Bytes
    context_bytes: BytesOrZero
    communicator_bytes: BytesOrZero


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Servers, links and switches. Rates are of one direction, of one GPU (NVLink) or one NIC.

    NVLink joins the GPUs of ``servers_per_domain`` servers, which stand in the order of their ranks.
    A leaf joins ``servers_per_leaf`` servers, a pod ``servers_per_pod``; between pods the NICs of a pod share
    1 / ``pod_oversubscription`` of their rate.
    """

    gpus_per_server: WholeCount
    servers: WholeCount
    nvlink_bytes_per_s: BytesPerSecond
    nics_per_server: WholeCount
    nic_bytes_per_s: BytesPerSecond
    nic_latency_s: SecondsOrZero
    switch_latency_s: SecondsOrZero
    servers_per_leaf: WholeCount
    servers_per_pod: WholeCount
    pod_oversubscription: Ratio
    servers_per_domain: WholeCount = 1

    @property
    def domain_gpus(self) -> int:
        """GPUs that reach each other over NVLink."""
        return self.gpus_per_server * self.servers_per_domain


@dataclass(frozen=True, kw_only=True)
class Host:
    """A server's own memory and cores, and the link of each GPU to it: what one GPU has while all are at it alike.

    ``link``: ``nic`` where copies and the bytes of the GPU's NIC cross one bus; without it, each way is its own.
    """

    memory_bytes: Bytes
    to_bytes_per_s: BytesPerSecond
    from_bytes_per_s: BytesPerSecond
    latency_s: SecondsOrZero
    cores: WholeCount = 1
    link: str = ""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """What a job lives through there.

    ``gpu_mtbf_s``: GPU time between failures that nobody planned; ``gpu_mtbf_low_s``: where more fails.
    ``node_fraction``: of the failures, those that take a server out for ``repair_s``; ``hang_fraction``: those that end
    no process. ``notice_s``: until a process that ended is noticed, ``restart_s``: until its job has processes again.
    ``pause_s``: of a checkpoint, beside the copy of its bytes to the host. Rates are of the storage, for all ranks.
    """

    gpu_mtbf_s: LongTime
    gpu_mtbf_low_s: LongTime
    node_fraction: FractionOrZero
    hang_fraction: FractionOrZero
    repair_s: LongTime
    notice_s: Duration
    pause_s: Duration
    restart_s: Duration
    write_bytes_per_s: BytesPerSecond
    read_bytes_per_s: BytesPerSecond


PROTOCOLS = ("LL", "LL128", "Simple")
SERVERS = ("1", "2", "4")  # the last: and more
PRIMITIVES = ("all_gather", "all_reduce", "all_to_all", "send_recv")  # of gloo
ByProtocol = Annotated[YamlTable, Rule("time", table=True, names=PROTOCOLS)]
ByServers = Annotated[YamlTable, Rule("rate", table=True, names=SERVERS)]


@dataclass(frozen=True, kw_only=True)
class Nccl:
    """What NCCL's tuner knows (``network.py``). Tables by protocol, or by number of servers: "1", "2", "4" (and more).

    ``correction``: a CSV beside the cluster file, kind, ranks, bytes, ratio: measured time over the formula's, in one
    server. ``ring_reach``, ``tree_reach``: rate reached over several servers, of the formula's, by bytes of one rank
    (rings) or of the buffer (trees). ``init_base_s``, ``init_rank_s``: to make one communicator, and for each of its
    ranks.
    """

    ring_base_s: ByProtocol
    ring_hop_s: ByProtocol
    ring_network_hop_s: ByProtocol
    tree_base_s: ByProtocol
    tree_hop_s: ByProtocol
    tree_network_hop_s: ByProtocol
    nvls_s: Seconds
    nvls_tree_network_hop_s: Seconds
    pat_base_s: Seconds
    pat_rank_s: Seconds
    pat_hop_fraction: Fraction
    pat_efficiency: Fraction
    post_s: Seconds
    ring_plateau: Ratio
    server_channels: WholeCount
    server_channel_bytes_per_s: BytesPerSecond
    nic_fraction: Fraction
    p2p_fraction: Fraction
    ring_ll_fraction: Fraction
    ring_ll128_fraction: Fraction
    tree_fraction: Fraction
    tree_pattern_fraction: Fraction
    tree_ll_fraction: Fraction
    ll_cap_bytes_per_s: ByServers
    ring_ll128_cap_bytes_per_s: ByServers
    tree_ll128_cap_bytes_per_s: ByServers
    tree_cap_bytes_per_s: ByServers
    nvls_channels: WholeCount
    nvls_channel_bytes_per_s: BytesPerSecond
    nvls_efficiency: Fraction
    nvls_tree_cap_bytes_per_s: Annotated[YamlTable, Rule("rate", table=True, names=SERVERS[1:])]
    nvls_least_ranks: WholeCount
    ctas_per_channel: WholeCount
    ring_reach: FractionBySize
    tree_reach: FractionBySize
    init_base_s: Duration
    init_rank_s: Seconds
    correction: str = ""


@dataclass(frozen=True, kw_only=True)
class Gloo:
    """Collectives of CPU processes: time of one message and rate of one rank, by primitive.

    The sum after an all-to-all reads ``sum_bytes_per_s``.
    ``core_fraction``: of that time, the part in which the cores copy; the rest is waiting.
    """

    message_s: Annotated[YamlTable, Rule("time", table=True, names=PRIMITIVES)]
    bytes_per_s: Annotated[YamlTable, Rule("rate", table=True, names=PRIMITIVES)]
    sum_bytes_per_s: BytesPerSecond
    core_fraction: Fraction


@dataclass(frozen=True, kw_only=True)
class OverlapConstants:
    """Slowdown beyond the SMs and the bandwidth that a collective takes while compute runs, and the reverse."""

    compute_slowdown: Ratio
    communication_slowdown: Ratio


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Spread of the step time of one rank, as a fraction of its mean: the slowest of n ranks sets the pace."""

    step_fraction: FractionOrZero

    def factor(self, ranks: int) -> float:
        """Expected step time of ``ranks`` synchronous ranks over that of one: 1 + sigma sqrt(2 ln n).

        The leading term of the mean of the largest of n normal draws (Cramer 1946, section 28.6).
        """
        return 1.0 + self.step_fraction * math.sqrt(2.0 * math.log(ranks)) if ranks > 1 else 1.0
