"""What a copy to or from the host's memory costs (torch-free).

The GPU's copy engines make it: it holds no SM. Its rate is that of one GPU while all of its server copy. Where GPU and
NIC are on one bus, copies share it with the NIC's bytes. On a CPU a core makes them.
"""

from __future__ import annotations

from ...errors import CinemeshError
from ...parallel.ir.records import HOST_LANES, Space
from ..clusters.cluster import Cluster
from .network import Cost


def copy_cost(cluster: Cluster, to: Space, size_bytes: int) -> Cost:
    """A copy to a space from the other. Raises CinemeshError for a cluster of whose host nothing is known."""
    host, gpu = cluster.host, cluster.gpu
    if host is None:
        raise CinemeshError(
            f"plan: offload: cluster {cluster.name} says nothing of its host's memory",
            remedy="add the section host to its file (docs/cost_model.md), or leave offload out",
        )
    rate = host.to_bytes_per_s if to is Space.HOST else host.from_bytes_per_s
    sms = gpu.sms if cluster.gloo is not None else 0
    return Cost(host.latency_s, size_bytes / rate, host.link or HOST_LANES[to], sms, rate, "copy", "DMA")
