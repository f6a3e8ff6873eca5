"""From one plan to another between the stages of a training: what changes, and what that costs (torch-free)."""

from __future__ import annotations

from ...model.config import ModelConfig
from ...parallel.ir.plan import Plan
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.lifetime import checkpoint_bytes
from ...perf_model.prices.startup import hosts_start, start_up
from .compare import before_and_after, changes
from .reply import PlanChange, Relaunch


def relaunch(config: ModelConfig, cluster: Cluster, before: Plan | None, after: Plan) -> Relaunch | None:
    """What changes between the best plans of two stages, if anything does."""
    if before is None or before == after:
        return None
    told = [(name, *before_and_after(before, values)) for name, values in changes(before, after)]
    states, own = checkpoint_bytes(config, after)
    hosts = hosts_start(after, cluster)
    return Relaunch(
        changes=[PlanChange(name=name, before=old, after=new) for name, old, new in told],
        state_bytes=states,
        rank_bytes=own,
        start_up_s=sum(each.seconds for each in start_up(after, cluster)) + (hosts.seconds if hosts else 0.0),
    )


def relaunch_text(between: Relaunch | None) -> str:
    """The same in a line."""
    if between is None:
        return "the best plan stays"
    told = "; ".join(f"{change.before} -> {change.after}" for change in between.changes)
    return (
        f"{told}; a checkpoint of {between.state_bytes / 1e9:,.0f} GB is written and read, "
        f"{between.rank_bytes / 1e9:.2f} GB by a rank of the new plan, whose communicators take "
        f"{between.start_up_s:.0f} s"
    )
