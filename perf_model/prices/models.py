"""What prices a step on one cluster (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass

from ..clusters.cluster import Cluster
from .compute import Compute
from .network import Network


@dataclass(frozen=True)
class PriceModels:
    """A cluster with the models of its compute and network; they remember what they priced."""

    cluster: Cluster
    compute: Compute
    network: Network

    @classmethod
    def of(cls, cluster: Cluster) -> PriceModels:
        return cls(cluster, Compute(cluster), Network(cluster))
