"""Lower bounds of a family's time and memory before anything of it is built (torch-free).

Two programs of a few blocks serve: one rank that holds all tokens and heads (tp = cp = 1), and tp = cp = 2. No record's
FLOPs or bytes shrink faster than 1 / (tp * cp) when a family splits more, a gather over tp moves at least S / cp tokens,
and one over cp at least heads / tp heads. So every family's compute, bytes and collectives are at least what these two
programs' are, scaled. The bounds only cut the search; tests hold them against the built programs.
"""

from __future__ import annotations

from dataclasses import replace

from ..parallel.ops import OPS
from ..parallel.program import Op
from .cluster import Cluster
from .compute import Compute
from .network import Network, ring_group
from .skeleton import Shallow, Skeleton

Recompute = str | tuple[str, ...]


class Floor:
    """Floors of one model on one latent, from a program that serves all degrees."""

    def __init__(self, shallow: Shallow, compute: Compute, network: Network, cluster: Cluster) -> None:
        self.compute, self.network, self.cluster = compute, network, cluster
        self._one = shallow.on(shallow.plan.with_degrees(tp=1, cp=1))
        self._four = shallow.on(shallow.plan.with_degrees(tp=2, cp=2))
        self._alone: dict[Recompute, Skeleton] = {}
        self._split: dict[Recompute, Skeleton] = {}
        self._totals: dict[Recompute, float] = {}

    def _skeleton(self, made: dict[Recompute, Skeleton], shallow: Shallow, recompute: Recompute) -> Skeleton:
        if recompute not in made:
            plan = replace(shallow.plan, recompute=recompute)
            made[recompute] = Skeleton(shallow, plan, self.compute, self.cluster)
        return made[recompute]

    def _rate(self, op: Op, dtype: str, head_dim: int) -> float:
        """FLOP/s that no record of this kind exceeds, whatever its shape."""
        if op.kind == "matmul":
            return self.compute.ceiling(dtype)
        direction = "backward" if op.kind.endswith("backward") else "forward"
        return self.compute.attention_ceiling(direction, head_dim, dtype)

    def _once(self, recompute: Recompute) -> float:
        """Compute seconds of one rank that does everything: products at the best rates, the rest at its bytes."""
        skeleton = self._skeleton(self._alone, self._one, recompute)
        program, head_dim = skeleton.program, self._one.config.head_dim
        total = 0.0
        for i, op in enumerate(program.ops):
            if op.kind not in OPS:
                continue
            if OPS[op.kind].matmul:
                seconds = program.flops(op) / self._rate(op, program.plan.compute_dtype, head_dim)
            else:
                seconds = self.compute.least_s(program, op)
            total += skeleton.repeats(i) * seconds
        return total

    def compute_s(self, recompute: Recompute, parts: int, micro_batches: int) -> float:
        """Of a step whose tokens and weights are split ``parts`` ways."""
        if recompute not in self._totals:
            self._totals[recompute] = self._once(recompute)
        return self._totals[recompute] * micro_batches / parts

    def peak_bytes(self, recompute: Recompute, parts: int, shards: int) -> float:
        """Of one rank, whose share of everything is at least 1 / ``parts`` of what one rank with all tokens needs."""
        skeleton = self._skeleton(self._alone, self._one, recompute)
        return skeleton.peak_bytes(self._one.plan.with_degrees(dp_shard=shards)) / parts

    def communication_s(self, recompute: Recompute, tp: int, cp: int, micro_batches: int) -> tuple[float, float]:
        """Of the collectives over tp and cp, each on its best placement: what nothing hides; the busier lane's time."""
        alone = 0.0
        busy = {"tp": 0.0, "cp": 0.0}
        for (collective, window), times in self._skeleton(self._split, self._four, recompute).terms.items():
            if collective.axes not in (("tp",), ("cp",)):
                continue
            (axis,) = collective.axes
            ranks, other = (tp, cp) if axis == "tp" else (cp, tp)
            if ranks > 1:
                payload = collective.bytes * 2 // other if collective.split else collective.bytes
                group = ring_group(self.cluster, ranks)
                seconds = times * self.network.collective(collective.kind, payload, group).seconds
                busy[axis] += seconds
                alone += seconds if window < 0.0 else 0.0
        return alone * micro_batches, max(busy.values()) * micro_batches
