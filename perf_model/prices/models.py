"""What prices a step on one cluster (torch-free)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ...kernels.ops import OPS
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op
from ...parallel.passes.device_memory import Workspaces
from ..clusters.cluster import Cluster
from .compute import Compute
from .footprint import workspaces
from .network import Network, group_of
from .timeline import cost_of


@dataclass(frozen=True)
class PriceModels:
    """A cluster with the models of its compute and network; they remember what they priced."""

    cluster: Cluster
    compute: Compute
    network: Network

    @classmethod
    def of(cls, cluster: Cluster) -> PriceModels:
        return cls(cluster, Compute(cluster), Network(cluster))

    @cached_property
    def workspaces(self) -> Workspaces:
        """Of the kernels that run there."""
        return workspaces(self.cluster)

    def record_s(self, plan: Plan) -> Callable[[Program, Op], float]:
        """Seconds of a record alone, as the choice of kept activations asks for them."""

        def seconds(program: Program, op: Op) -> float:
            if op.kind in OPS:
                return self.compute.op_s(program, op)
            if op.is_wait:
                return 0.0
            group = group_of(self.cluster, plan, op.axes)
            ctas = plan.ctas(op.axes)
            return cost_of(self.network, op.kind, program.payload_bytes(op), group, ctas, op.to).seconds

        return seconds
