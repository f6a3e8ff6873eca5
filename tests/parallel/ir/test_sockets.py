"""How many sockets a rank needs where no machine here has as many ranks; of 16 the kernel counts: test_hosts.py."""

from __future__ import annotations

from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.sockets import sockets

MOST = 64


def test_no_rank_of_6144_needs_more_than_64() -> None:
    """A usual limit of open files is 1,024; gloo meshes beside NCCL's groups were 12,878 a rank."""
    for plan in (Plan(tp=4, cp=2, dp_shard=768), Plan(tp=4, cp=2, dp_shard=192, dp_replicate=4)):
        counts = {rank: sum(row.count for row in sockets(plan, rank, "nccl")) for rank in range(plan.world_size)}
        assert max(counts.values()) <= MOST, max(counts, key=counts.__getitem__)


def test_a_rank_of_the_planner_s_plan_by_kind() -> None:
    plan = Plan(tp=4, cp=2, dp_shard=768)
    found = [(row.of, row.count) for row in sockets(plan, 1, "nccl")]
    communicators = ("tp", "cp", "dp_shard*cp:all_gather", "dp_shard*cp:reduce_scatter", "dp_shard*cp*tp")
    assert found == [
        ("store", 1),
        ("hosts", 5),
        ("hosts", 5),
        *((name, 7) for name in (*communicators, "dp_replicate*dp_shard*cp*tp")),
        ("RAS", 4),
    ]
    assert sockets(Plan(), 0, "nccl") == []
