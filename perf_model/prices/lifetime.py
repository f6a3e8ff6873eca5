"""What a plan's run lives through on a cluster: checkpoints, failures, goodput and what it costs (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import CinemeshError
from ...kernels.counts import DTYPE_BYTES
from ...model.config import ModelConfig, trained
from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from ..clusters.schema import Operations
from .goodput import DAY_S, Conditions, Shares, best_simulated, daly_s, mean_shares, proposed_steps, worthwhile_spares
from .restart import SHAPE_RECORDS, RestartPart, restart_parts

STATES = 4  # of a checkpoint: master weights, two moments, averaged weights
COPIES = 2  # in memory, of each shard: one is whole while the other is made
HANG_S, HANG_STEPS = 60.0, 10.0  # until a hang is told, at least, and in steps (launch/cluster/sidecar.py)
MOST_SPARES = 8  # nodes: at these rates more of them wait than work
WHOLE = 1e6  # samples, of which GPU hours are told


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """A run at one rate of failures. Times are seconds; shares of a run's time; GPU hours of a million samples.

    ``steps``: between checkpoints, as proposed; ``best_steps``, ``best_training``: what the simulation finds best.
    ``spares``: nodes more that give most training for all that are paid; everything else is with them.
    """

    mtbf_s: float
    steps: int
    interval_s: float
    shares: Shares
    best_steps: int
    best_training: float
    spares: int
    samples_per_day: float
    gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class MemoryCopies:
    """Of the same run, with copies of the states in the servers' memory every ``steps`` steps.

    ``server_bytes``: that they take there; ``pause_s``: of each; ``replicated``: whether another server has each too,
    so that a lost one costs no more. ``training``, ``training_low``: shares of time, where fewer things fail and where
    more do.
    """

    steps: int
    server_bytes: int
    pause_s: float
    replicated: bool
    training: float
    training_low: float


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """A plan's run on a cluster, where fewer things fail and where more do.

    ``restart_s``: from noticing to a step; ``restart``: its parts, and before them the noticing. ``in_memory``: None
    for a cluster that does not say how fast a copy to the host is.
    """

    checkpoint_bytes: int
    rank_bytes: int
    pause_s: float
    write_s: float
    restart_s: float
    restart: list[RestartPart]
    usual: Goodput
    low: Goodput
    in_memory: MemoryCopies | None


def checkpoint_bytes(config: ModelConfig, plan: Plan) -> tuple[int, int]:
    """Of all ranks together, and what one of those that write them writes."""
    weights = sum(math.prod(parameter.shape) for parameter in trained(config))
    states = STATES * DTYPE_BYTES[plan.stat_dtype] * weights
    return states, math.ceil(states / (plan.world_size // plan.dp_replicate))


def operations_of(cluster: Cluster) -> Operations:
    """Raises CinemeshError for a cluster file that says nothing of failures."""
    if cluster.operations is None:
        raise CinemeshError(
            f"cluster {cluster.name} says nothing of failures and storage",
            remedy="add operations to its file, or base: _operations",
        )
    return cluster.operations


def lifetime(
    config: ModelConfig,
    plan: Plan,
    cluster: Cluster,
    step_s: float,
    samples: float,
    records: Sequence[int] = (SHAPE_RECORDS,),
) -> Lifetime:
    """Of a run whose steps take ``step_s`` and ``samples``; ``records``: of the step of every shape.

    Raises CinemeshError as :func:`operations_of`.
    """
    operations = operations_of(cluster)
    whole, own = checkpoint_bytes(config, plan)
    pause_s = operations.pause_s + (own / cluster.host.from_bytes_per_s if cluster.host is not None else 0.0)
    restart = restart_parts(plan, cluster, operations, whole, records)
    restart_s = sum(part.seconds for part in restart[1:])
    conditions = Conditions(
        step_s=step_s,
        mtbf_s=operations.gpu_mtbf_s / plan.world_size,
        pause_s=pause_s,
        write_s=whole / operations.write_bytes_per_s,
        notice_s=operations.notice_s,
        hang_s=max(HANG_S, HANG_STEPS * step_s),
        hang_fraction=operations.hang_fraction,
        restart_s=restart_s,
        node_fraction=operations.node_fraction,
        repair_s=operations.repair_s,
    )
    nodes = math.ceil(plan.world_size / cluster.gpus_per_server)
    often = replace(conditions, mtbf_s=operations.gpu_mtbf_low_s / plan.world_size)
    return Lifetime(
        checkpoint_bytes=whole,
        rank_bytes=own,
        pause_s=pause_s,
        write_s=conditions.write_s,
        restart_s=restart_s,
        restart=restart,
        usual=(usual := _goodput(conditions, nodes, plan.world_size, samples)),
        low=(low := _goodput(often, nodes, plan.world_size, samples)),
        in_memory=_copies(config, plan, cluster, (conditions, usual), (often, low)),
    )


def _copies(
    config: ModelConfig, plan: Plan, cluster: Cluster, *lives: tuple[Conditions, Goodput]
) -> MemoryCopies | None:
    """Copies as often as loses least, in runs that are else as they are: usual ones, and such where more fails."""
    if cluster.host is None:
        return None
    whole, _ = checkpoint_bytes(config, plan)
    held = math.ceil(whole * plan.dp_replicate / plan.world_size)  # of a rank: all of its shard
    pause_s, (usual, _) = held / cluster.host.from_bytes_per_s, lives[0]
    steps = max(1, round(daly_s(pause_s, usual.mtbf_s) / usual.step_s))
    apart = math.prod(plan.size(axis) for axis in plan.order[: plan.order.index("dp_replicate")])
    replicated = plan.dp_replicate > 1 and apart >= cluster.gpus_per_server
    training = [
        mean_shares(
            replace(
                conditions,
                spares=known.spares,
                memory_s=steps * conditions.step_s,
                memory_pause_s=pause_s,
                replicated=replicated,
            ),
            known.steps,
        ).training
        for conditions, known in lives
    ]
    ranks = min(plan.world_size, cluster.gpus_per_server)
    return MemoryCopies(
        steps=steps,
        server_bytes=COPIES * held * ranks,
        pause_s=pause_s,
        replicated=replicated,
        training=training[0],
        training_low=training[1],
    )


def _goodput(conditions: Conditions, nodes: int, ranks: int, samples: float) -> Goodput:
    spares = worthwhile_spares(conditions, nodes, MOST_SPARES)
    conditions = replace(conditions, spares=spares)
    steps = proposed_steps(conditions)
    shares = mean_shares(conditions, steps)
    best_steps, best_training = best_simulated(conditions)
    per_s = samples / conditions.step_s * shares.training
    paid = ranks * (nodes + spares) / nodes
    return Goodput(
        mtbf_s=conditions.mtbf_s,
        steps=steps,
        interval_s=steps * conditions.step_s,
        shares=shares,
        best_steps=best_steps,
        best_training=best_training,
        spares=spares,
        samples_per_day=per_s * DAY_S,
        gpu_hours=WHOLE / per_s * paid / 3600.0 if per_s else math.inf,
    )
