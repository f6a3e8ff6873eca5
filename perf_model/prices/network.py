"""Network: what a collective costs over a group of ranks, by NCCL's own arithmetic (torch-free).

NCCL's tuner (``src/graph/tuning.cc``) predicts ``latency + bytes / bandwidth`` for each algorithm and protocol, and
runs the smallest; so does this file, with its constants (cluster file, section ``nccl``). ``bytes`` is the full size:
output of an all-gather, input of a reduce-scatter, buffer of an all-reduce. Two empirical corrections stand beside the
formula, both in the cluster file: in one server, measured time over the formula's (``correction``); over several
servers, the part of the formula's bandwidth that is reached (``ring_reach``, ``tree_reach``).

[Note: thread blocks] A channel is a thread block on an SM of its own. NCCL takes as many as reach the link's peak (four
a search channel between Hopper servers, "to reach peak BW": src/graph/connect.cc); a limit leaves out the channels
beyond it, and the tuner does not hear of it: the algorithm stays, its rate falls in proportion. More blocks than NCCL's
own hold more SMs and move nothing faster. Messages between pairs do not obey the limit (NVIDIA/nccl issue 1598).

[Note: domains] GPUs that reach each other over NVLink are one node to NCCL, be it one server or a rack of them
(ncclMnnvlCheck, src/init.cc): a domain, below. Of all groups along the same axes, which run at once, the one whose
members share a domain with the fewest others is priced: where degrees and domains do not nest, that of rank 0 may lie
better than the rest.

[Note: NICs of a ring] A ring enters and leaves a domain through the NICs of its own members, and the groups beside it
do the same at the same time: a group with g of a domain's G GPUs has g / G of the domain's NICs.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from ...parallel.ir.communicators import GROUPS
from ...parallel.ir.layout import Axes
from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from ..clusters.constants import YamlTable
from ..clusters.grid import Grid, read_grids
from ..clusters.schema import PROTOCOLS, Gloo, Nccl, Topology

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
# HBM traffic of one rank for each byte of the full size. Gather: write all, read what is passed on. Reduce-scatter:
# each passing byte is read, added to an own one that is read, and written. All-reduce by ring: both. NVLS: once each.
MEMORY_PASSES = {"all_gather": 2.0, "reduce_scatter": 3.0, "all_reduce": 5.0, "all_to_all": 2.0, "send_recv": 2.0}
NVLS_MEMORY_PASSES = 2.0
LEAST_CHANNELS = 2.0  # of the graph, over several servers; a NIC is then split between them (tuning log)
RING_REACH_SERVERS = 32  # servers of the runs that ``ring_reach`` was fitted on
SIMPLE_POSTS = 3  # network posts that a Simple step pays, of ``post_s`` each (tuning.cc)


@dataclass(frozen=True)
class Group:
    """The ranks of one collective. ``per_domain`` of them share a domain; ``nics``: theirs where they are fewest."""

    ranks: int
    per_domain: int
    domains: int
    leaves: int
    pods: int
    nics: float


@dataclass(frozen=True, slots=True)
class Cost:
    """A collective run alone: ``latency_s`` before its bytes flow, ``transfer_s`` while they do.

    ``sms`` are held by its channels, ``memory_bytes_per_s`` is its traffic in the GPU's memory during the transfer.
    """

    latency_s: float
    transfer_s: float
    link: str
    sms: float
    memory_bytes_per_s: float
    algorithm: str
    protocol: str

    @property
    def seconds(self) -> float:
        return self.latency_s + self.transfer_s


FREE = Cost(0.0, 0.0, "local", 0, 0.0, "none", "none")


# -- groups -----------------------------------------------------------------------------------------------------------


def group_of(cluster: Cluster, plan: Plan, axes: Axes) -> Group:
    """The group along ``axes``, placed by the plan's rank order (innermost axis = neighbouring ranks)."""
    return placed(cluster, plan.order, tuple(plan.size(axis) for axis in plan.order), axes)


def placed(cluster: Cluster, order: Axes, sizes: tuple[int, ...], axes: Axes) -> Group:
    """The group along ``axes`` where ranks are numbered by ``order``, innermost first, of these ``sizes``."""
    members: list[tuple[int, int]] = []  # (size, distance of neighbours) of the group's axes
    others: list[tuple[int, int]] = []  # of the other ones: they tell the groups apart
    stride, nested, width = 1, True, cluster.topology.domain_gpus
    for axis, size in zip(order, sizes, strict=True):
        own = members if axis in axes else others
        if size > 1:
            if own and math.prod(own[-1]) == stride:  # one goes on where the other ends
                own[-1] = own[-1][0] * size, own[-1][1]
            else:
                own.append((size, stride))
        stride *= size
        nested = nested and (width % stride == 0 or stride % width == 0)
    return _group(cluster.topology, tuple(members), None if nested else tuple(others))


def ring_group(cluster: Cluster, ranks: int, stride: int = 1) -> Group:
    """The group of ``ranks`` ranks that lie ``stride`` apart."""
    return _group(cluster.topology, ((ranks, stride),), ())


Groups = dict[Axes, Group]
Strides = tuple[tuple[int, int], ...]  # axes: (size, distance of neighbours), innermost first
_AXES = tuple(dict.fromkeys(axes for axes, _ in GROUPS))


def groups_of(plan: Plan, cluster: Cluster, order: Axes = ()) -> Groups:
    """How every group of axes lies on the network, by the plan's rank order or another."""
    order = order or plan.order
    sizes = tuple(plan.size(axis) for axis in order)
    return {axes: placed(cluster, order, sizes, axes) for axes in _AXES if plan.size(axes) > 1}


@lru_cache(maxsize=4096)
def _group(topology: Topology, axes: Strides, others: Strides | None) -> Group:
    """``others``: the axes that tell groups apart; None where all groups lie alike, the same in every domain."""
    ranks = math.prod(size for size, _ in axes)
    server = topology.gpus_per_server
    domains = _blocks(axes, topology.domain_gpus)
    per_domain = math.ceil(ranks / domains)
    fewest = per_domain
    if others is not None:
        domains, fewest = _worst_spread(axes, others, topology.domain_gpus)
        per_domain = math.ceil(ranks / domains)
    return Group(
        ranks=ranks,
        per_domain=per_domain,
        domains=domains,
        leaves=_blocks(axes, server * topology.servers_per_leaf),
        pods=_blocks(axes, server * topology.servers_per_pod),
        nics=fewest * topology.nics_per_server / server,
    )


def _worst_spread(axes: Strides, others: Strides, width: int) -> tuple[int, int]:
    """(domains, fewest members in one of them) of the group with the fewest, by enumeration; ``width``: of a domain."""
    firsts, members = {0}, [0]
    for size, stride in others:
        firsts = {(first + i * stride) % width for first in firsts for i in range(size)}
    for size, stride in axes:
        members = [member + i * stride for member in members for i in range(size)]
    spreads: list[tuple[int, int]] = []
    for first in firsts:
        counts = Counter((first + member) // width for member in members).values()
        spreads.append((len(counts), min(counts)))
    return max(spreads, key=lambda spread: (spread[0] > 1, -spread[1], spread[0]))


def _blocks(axes: Strides, width: int) -> int:
    """Blocks of ``width`` consecutive ranks that a group touches; ``axes``: (size, stride), innermost first."""
    reach = sum((size - 1) * stride for size, stride in axes if stride < width)  # it passes over no block
    firsts, repeats = [0], 1
    for size, stride in axes:
        if stride % width == 0:  # whole blocks further: as many again, none of them met before
            repeats *= size
        elif stride > width:
            firsts = [first + i * stride for i in range(size) for first in firsts]
    touched, last = 0, -1
    for first in firsts:  # ascending: two neighbours share one block at most
        begin, last = max(first // width, last + 1), (first + reach) // width
        touched += last + 1 - begin
    return repeats * touched


# -- cost -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """One algorithm with one protocol, as the tuner sees it: seconds, and bytes/s of the full size.

    ``channels``: thread blocks.
    """

    algorithm: str
    protocol: str
    latency_s: float
    bytes_per_s: float
    channels: float


class Network:
    """Prices collectives on one cluster. ``nvls``, ``pat``: whether NCCL may use them (environment, version)."""

    def __init__(self, cluster: Cluster, *, nvls: bool = True, pat: bool = True) -> None:
        self.cluster = cluster
        self.nvls = nvls
        self.pat = pat
        self._costs: dict[tuple[str, int, Group, int], Cost] = {}
        nccl = cluster.nccl
        self._corrections: dict[str, Grid] = {}
        if nccl is not None:
            if nccl.correction:
                self._corrections = read_grids(cluster.beside(nccl.correction))
            self._ring_reach = _by_bytes(nccl.ring_reach)
            self._tree_reach = _by_bytes(nccl.tree_reach)

    def collective(self, kind: str, payload_bytes: int, group: Group, ctas: int = 0) -> Cost:
        """Cost of ``kind`` (one of ``KINDS``) over ``group``; ``payload_bytes`` is the full size, or the message.

        ``ctas``: thread blocks of the communicator; 0: NCCL's own choice.
        """
        if group.ranks == 1 or payload_bytes == 0:
            return FREE
        key = (kind, payload_bytes, group, ctas)
        if key not in self._costs:
            if self.cluster.gloo is not None:
                cost = self._gloo(self.cluster.gloo, kind, payload_bytes, group)
            elif kind in ("send_recv", "all_to_all"):
                cost = self._pairs(self._nccl, kind, payload_bytes, group)
            else:
                cost = self._tuned(kind, payload_bytes, group, ctas)
            self._costs[key] = cost
        return self._costs[key]

    @property
    def _nccl(self) -> Nccl:
        assert self.cluster.nccl is not None
        return self.cluster.nccl

    def _tuned(self, kind: str, size: int, group: Group, ctas: int) -> Cost:
        """The fastest of the tuner's candidates, corrected, on ``ctas`` thread blocks where they are limited."""
        best: tuple[float, float, Candidate] | None = None
        for candidate in self.candidates(kind, group):
            transfer = size / (candidate.bytes_per_s * self._reach(candidate, size, group))
            if best is None or candidate.latency_s + transfer < best[0] + best[1]:
                best = (candidate.latency_s, transfer, candidate)
        assert best is not None
        latency, transfer, chosen = best
        ratio = self._ratio(kind, size, group)
        passes = NVLS_MEMORY_PASSES if chosen.algorithm.startswith("NVLS") else MEMORY_PASSES[kind]
        if ctas:
            transfer *= max(1.0, chosen.channels / ctas)
            chosen = replace(chosen, channels=float(ctas))
        return self._cost(latency * ratio, transfer * ratio, size * passes, group, chosen)

    def _cost(self, latency: float, transfer: float, traffic: float, group: Group, chosen: Candidate) -> Cost:
        rate = min(traffic / transfer, self.cluster.gpu.memory_bytes_per_s)
        sms = min(round(chosen.channels), self.cluster.gpu.sms)
        link = "nvlink" if group.domains == 1 else "nic"
        return Cost(latency, transfer, link, sms, rate, chosen.algorithm, chosen.protocol)

    def _ratio(self, kind: str, size: int, group: Group) -> float:
        """Measured over predicted time, in one server. Without NVLS an all-reduce is a ring, as on few ranks."""
        grid = self._corrections.get(kind)
        if grid is None or group.domains > 1:
            return 1.0
        few = kind == "all_reduce" and not self.nvls
        return grid.at(min(group.ranks, self._nccl.nvls_least_ranks - 1) if few else group.ranks, size)

    def _reach(self, candidate: Candidate, size: int, group: Group) -> float:
        """The part of the formula's bandwidth that is reached over several servers."""
        if group.domains == 1:
            return 1.0
        if candidate.algorithm in ("Ring", "PAT"):
            return self._ring_part(size / group.ranks, group.domains)
        return self._tree_reach.at(size)

    def _ring_part(self, rank_bytes: float, servers: int) -> float:
        """The reach of a ring; it was measured over ``RING_REACH_SERVERS`` and falls with each doubling up to there."""
        return self._ring_reach.at(rank_bytes) ** min(1.0, math.log2(servers) / math.log2(RING_REACH_SERVERS))

    def network_bytes_per_s(self, group: Group) -> float:
        """What the group's NICs of one server carry, in each direction, through its pods' uplinks."""
        topology = self.cluster.topology
        rate = topology.nic_bytes_per_s * group.nics
        crossing = topology.pod_oversubscription * group.pods / group.domains if group.pods > 1 else 1.0
        return rate / max(1.0, crossing)

    def candidates(self, kind: str, group: Group) -> list[Candidate]:
        """Every algorithm and protocol that the tuner weighs, before any correction (tuning.cc, ncclTopoTuneModel)."""
        c, topology = self._nccl, self.cluster.topology
        n, servers = group.ranks, group.domains
        one = servers == 1
        tier = "1" if one else "2" if servers == 2 else "4"
        if one:
            channels = float(c.server_channels)
            bus = c.server_channels * c.server_channel_bytes_per_s
        else:
            channels = max(group.nics, LEAST_CHANNELS)
            bus = self.network_bytes_per_s(group) * c.nic_fraction
        alone = servers == n  # one rank a server: every step crosses the network, at the tree's latency
        reduce = kind == "all_reduce"
        sweeps = 2 if reduce else 1
        crossings = sweeps * (servers - 1)
        far = 2.0 * topology.switch_latency_s  # up to the spine and down again
        found: list[Candidate] = []

        def add(algorithm: str, protocol: str, latency: float, rate: float, using: float) -> None:
            found.append(Candidate(algorithm, protocol, latency, rate, using * c.ctas_per_channel))

        for p in PROTOCOLS:
            nic = topology.nic_latency_s * (2 if p == "Simple" else 1)
            if p == "LL":
                rate = min(c.ll_cap_bytes_per_s[tier], bus * c.ring_ll_fraction)
            elif p == "LL128":
                rate = min(bus * c.ring_ll128_fraction, channels * c.ring_ll128_cap_bytes_per_s[tier])
            else:
                rate = bus
            hop = c.ring_hop_s[p]
            if not one:
                hop = max(hop, c.post_s * (SIMPLE_POSTS if p == "Simple" else 1))
            network = (c.tree_network_hop_s if alone else c.ring_network_hop_s)[p] + nic
            steps = sweeps * (n - 1)
            latency = c.ring_base_s[p] + (steps - crossings) * hop + crossings * network
            if reduce and not one and p == "Simple":
                latency *= c.ring_plateau
            latency += sweeps * group.leaves * far if group.leaves > 1 else 0.0
            add("Ring", p, latency, rate * n / steps, channels)
            if reduce:
                trunk = min(bus * c.tree_fraction, channels * c.tree_cap_bytes_per_s[tier])
                if p == "LL":
                    trunk = min(trunk * c.tree_ll_fraction, c.ll_cap_bytes_per_s[tier])
                elif p == "LL128":
                    share = 7 / 9 if one else 120 / 128
                    trunk = min(trunk * share, channels * c.tree_ll128_cap_bytes_per_s[tier])
                depth = math.floor(math.log2(servers))
                climb = depth * (c.tree_network_hop_s[p] + nic + (far if group.leaves > 1 else 0.0))
                latency = c.tree_base_s[p] + 2 * ((group.per_domain - 1) * c.tree_hop_s[p] + climb)
                add("Tree", p, latency, trunk * c.tree_pattern_fraction / 2, channels)
        whole = group.per_domain >= c.nvls_least_ranks
        if self.nvls and whole and one:
            rate = c.nvls_channels * c.nvls_channel_bytes_per_s * c.nvls_efficiency
            rate *= 1.0 if reduce else ((n - 1) / n) ** 2
            add("NVLS", "Simple", c.nvls_s, rate, c.nvls_channels)
        elif self.nvls and whole and reduce:
            rate = min(bus, group.nics * c.nvls_tree_cap_bytes_per_s[tier])
            latency = c.nvls_s + 2 * math.floor(math.log2(servers)) * (c.nvls_tree_network_hop_s + far)
            add("NVLSTree", "Simple", latency, rate * n / (2 * (n - 1)), c.nvls_channels)
        if self.pat and alone and not reduce:
            hop = c.tree_network_hop_s["Simple"] * c.pat_hop_fraction
            latency = c.pat_base_s + math.log2(n) * hop + n * c.pat_rank_s
            add("PAT", "Simple", latency, bus * c.pat_efficiency * n / (n - 1), channels)
        return found

    def _pairs(self, c: Nccl, kind: str, size: int, group: Group) -> Cost:
        """Messages between pairs: a ring shift of ``size`` bytes (send_recv) or an all-to-all of ``size`` in total."""
        topology = self.cluster.topology
        inside = topology.nvlink_bytes_per_s * c.p2p_fraction
        n = group.ranks
        sent = size if kind == "send_recv" else size * (n - 1) / n
        latency, transfer = c.ring_base_s["LL"] + c.ring_hop_s["LL"], sent / inside
        if group.domains > 1:
            # A shift leaves a server by one member, an all-to-all by all of them: each by its own NIC.
            out = size if kind == "send_recv" else size * (n - group.per_domain) / n
            rate = self.network_bytes_per_s(group) / group.per_domain * c.nic_fraction
            latency = c.ring_base_s["Simple"] + c.ring_network_hop_s["Simple"] + 2 * topology.nic_latency_s
            transfer = max(transfer, out / (rate * self._ring_part(out, group.domains)))
        ratio = self._ratio(kind, size, group)
        chosen = Candidate("Pairs", "Simple", 0.0, 0.0, c.server_channels)
        return self._cost(latency * ratio, transfer * ratio, MEMORY_PASSES[kind] * size, group, chosen)

    def _gloo(self, g: Gloo, kind: str, size: int, group: Group) -> Cost:
        """Gloo as ``comm.py`` drives it: a reduce-scatter is an all-to-all, then a sum in rank order.

        The cores that compute also copy the messages: only while the link between servers is slower are they free.
        """
        n, topology = group.ranks, self.cluster.topology
        primitive = "all_to_all" if kind == "reduce_scatter" else kind
        sweeps = 2 if kind == "all_reduce" else 1
        messages = 1 if kind == "send_recv" else sweeps * (n - 1)
        sent = size if kind == "send_recv" else size * sweeps * (n - 1) / n
        latency, transfer = messages * g.message_s[primitive], sent / g.bytes_per_s[primitive]
        copying = latency + transfer
        if group.domains > 1:
            outside = group.per_domain * (n - group.per_domain) * size / n if primitive == "all_to_all" else sent
            latency += messages * topology.nic_latency_s
            transfer = max(transfer, outside / self.network_bytes_per_s(group))
        if kind == "reduce_scatter":
            transfer += size / g.sum_bytes_per_s
            copying += size / g.sum_bytes_per_s
        link = "local" if group.domains == 1 else "nic"
        cores = g.core_fraction * min(1.0, copying / (latency + transfer))
        gpu = self.cluster.gpu
        return Cost(latency, transfer, link, cores * gpu.sms, cores * gpu.memory_bytes_per_s, primitive, "gloo")


def _by_bytes(reach: YamlTable) -> Grid:
    """A table of fractions by MiB."""
    return Grid.of([((float(size) * 2**20,), value) for size, value in reach.items()])
