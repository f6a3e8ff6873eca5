"""Where the time goes: all that lies between the chip's peak and the predicted MFU, in one waterfall (torch-free).

The seconds of a step are those that the model's FLOPs take at the chip's peak, and losses. The losses of compute are
found by pricing the same records again (``timeline.price``) on clusters whose constants are made ideal one after the
other, from the last of ``CAUSES`` to the first: each is the difference of two such prices. So a constant moves its own
loss and, in proportion, those below that it multiplies, never one above. The timeline's losses are its own account.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...kernels.ops import OPS
from ...parallel.ir.flops import model_flops
from ...parallel.ir.program import Program
from ..clusters.cluster import Cluster
from ..clusters.schema import AttentionFamily, PassConstants
from ..prices.compute import Compute
from ..prices.played import PlayedStep
from ..prices.timeline import price
from .explain import exposed_by_lane

LEAST = 5e-4  # share of a step; smaller losses are shown together
_ENDLESS = float("inf")


@dataclass(frozen=True)
class Loss:
    """One step down from the chip's peak.

    ``kind``: ``work`` beyond the model's FLOPs, the ``chip``, its ``kernels``, ``communication``, or the whole ``job``.
    ``share``: of the step; the shares of all losses and the MFU add up to one. ``ceiling``: the MFU with this loss and
    those above it alone. ``set_by``: constants of the cluster file that move it, or what else does.
    """

    name: str
    kind: str
    seconds: float
    share: float
    ceiling: float
    set_by: str


# -- causes -----------------------------------------------------------------------------------------------------------


def _attention(
    cluster: Cluster, change: Callable[[PassConstants], PassConstants], ordered: float | None = None
) -> Cluster:
    """With a change of every attention kernel."""

    def changed(family: AttentionFamily) -> AttentionFamily:
        kept = family.ordered if ordered is None else ordered
        return AttentionFamily(forward=change(family.forward), backward=change(family.backward), ordered=kept)

    return replace(cluster, attention={name: changed(family) for name, family in cluster.attention.items()})


def _measured(cluster: Cluster, table: str, value: float) -> Cluster:
    """With one value for all ops of a table, where ops were measured."""
    if cluster.measured is None:
        return cluster
    return cluster.with_(**{f"measured.{table}": dict.fromkeys(getattr(cluster.measured, table), value)})


def _full_clock(cluster: Cluster, dtype: str) -> Cluster:
    return cluster.with_(**{"gpu.sustained": dict.fromkeys(cluster.gpu.sustained, 1.0)})


def _full_matmul(cluster: Cluster, dtype: str) -> Cluster:
    return cluster.with_(**{"matmul.efficiency": dict.fromkeys(cluster.matmul.efficiency, 1.0)})


def _any_matmul(cluster: Cluster, dtype: str) -> Cluster:
    return replace(cluster, matmul=replace(cluster.matmul, tile=1, tail=0.0, prologue_s=0.0, grid=""))


def _full_attention(cluster: Cluster, dtype: str) -> Cluster:
    peak = {"1": cluster.gpu.peak_flops[dtype]}  # beyond the largest head dim none is padded
    return _attention(cluster, lambda law: replace(law, speed=peak), ordered=1.0)


def _any_attention(cluster: Cluster, dtype: str) -> Cluster:
    return _attention(cluster, lambda law: replace(law, rows=1, tail=0.0, prologue_s=0.0))


def _endless_memory(cluster: Cluster, dtype: str) -> Cluster:
    return _measured(cluster.with_(**{"gpu.memory_bytes_per_s": _ENDLESS}), "bytes_per_s", _ENDLESS)


def _no_floors(cluster: Cluster, dtype: str) -> Cluster:
    floors = ("matmul.floor_s", "stream.floor_s", "launch.eager_s", "launch.graph_s")
    changed = _attention(cluster.with_(**dict.fromkeys(floors, 0.0)), lambda law: replace(law, floor_s=0.0))
    return _measured(changed, "floor_s", 0.0)


@dataclass(frozen=True)
class Cause:
    """Why compute is slower than the peak. ``ideal``: the cluster without it, for products of a dtype."""

    name: str
    kind: str
    set_by: str
    ideal: Callable[[Cluster, str], Cluster]


CAUSES = (
    Cause("clock", "chip", "gpu.sustained", _full_clock),
    Cause("matmul kernels", "kernels", "matmul.efficiency", _full_matmul),
    Cause("matmul shapes", "kernels", "matmul: tile, tail, prologue_s, grid", _any_matmul),
    Cause("attention kernels", "kernels", "attention: speed, ordered", _full_attention),
    Cause("attention shapes", "kernels", "attention: rows, tail, prologue_s", _any_attention),
    Cause("memory-bound ops", "kernels", "gpu.memory_bytes_per_s, stream.fraction", _endless_memory),
    Cause("short kernels", "kernels", "floor_s of every kernel, launch.graph_s", _no_floors),
)


# -- the waterfall ----------------------------------------------------------------------------------------------------

_Lost = tuple[str, str, float, str]  # name, kind, seconds, what sets it


def waterfall(whole: PlayedStep, cluster: Cluster) -> list[Loss]:
    """All losses of a step played on a cluster, from the chip's peak down; their shares and the MFU add up to one."""
    peak_s = model_flops(whole.program) / (whole.plan.world_size * cluster.gpu.peak_flops[whole.plan.compute_dtype])
    found, down_to_s = list[Loss](), peak_s
    for name, kind, seconds, set_by in (*_of_compute(whole, cluster, peak_s), *_of_the_timeline(whole, cluster)):
        down_to_s += seconds
        found.append(Loss(name, kind, seconds, seconds / whole.step_s, peak_s / down_to_s, set_by))
    return found


def told(losses: Sequence[Loss]) -> list[Loss]:
    """For people: the losses that count, and behind them all others as one."""
    counting = [loss for loss in losses if abs(loss.share) >= LEAST]
    small = [loss for loss in losses if abs(loss.share) < LEAST]
    seconds, share = sum(loss.seconds for loss in small), sum(loss.share for loss in small)
    others = Loss("all others", "job", seconds, share, losses[-1].ceiling, "each under 0.05 %")
    return [*counting, others] if share else counting


def _of_compute(whole: PlayedStep, cluster: Cluster, peak_s: float) -> list[_Lost]:
    program, plan = whole.program, whole.plan
    rungs = [[record.seconds if record.computes else 0.0 for record in whole.tape.records]]  # with fewer causes each
    ideal = cluster
    for cause in reversed(CAUSES):
        ideal = cause.ideal(ideal, plan.compute_dtype)
        rungs.append(_seconds(program, ideal))
    rungs.append(_seconds(replace(program, plan=replace(plan, sm_margin=0)), ideal) if plan.sm_margin else rungs[-1])
    first = [not op.clone for op in program.ops]
    once_s = [sum(seconds for seconds, is_first in zip(rung, first, strict=True) if is_first) for rung in rungs]
    *of_causes, margin_s = (above - below for above, below in pairwise(once_s))
    scores_s = _scores_again(program, rungs[-1])
    return [
        ("attention's scores again", "work", scores_s, "backward makes five products, the model's FLOPs count four"),
        ("alike on several ranks", "work", once_s[-1] - scores_s - peak_s, "degrees; less gradients that nobody reads"),
        ("SMs left to collectives", "communication", margin_s, "the plan's sm_margin"),
        *((cause.name, cause.kind, s, cause.set_by) for cause, s in zip(CAUSES, reversed(of_causes), strict=True)),
        ("recompute", "work", sum(rungs[0]) - once_s[0], "the plan's recompute"),
    ]


def _seconds(program: Program, cluster: Cluster) -> list[float]:
    """Of compute in every record, as the timeline prices it."""
    tape = price(program, Compute(cluster), None, cluster)
    return [record.seconds if record.computes else 0.0 for record in tape.records]


def _scores_again(program: Program, ideal: Sequence[float]) -> float:
    """What attention's backward does beyond twice its forward, where nothing slows it."""
    at = {op.name: i for i, op in enumerate(program.ops)}
    return sum(
        ideal[i] - 2.0 * ideal[at[op.of]]
        for i, op in enumerate(program.ops)
        if op.of is not None and op.kind in OPS and OPS[op.kind].law == "attention"
    )


def _of_the_timeline(whole: PlayedStep, cluster: Cluster) -> Iterator[_Lost]:
    """What lanes side by side, encoders and stragglers add to compute alone."""
    timeline, alone_s = whole.timeline, whole.step_s / cluster.spread.factor(whole.plan.world_size)
    slowed_s = timeline.compute_busy_s - whole.tape.compute_s
    yield "slowed by collectives", "communication", slowed_s, "overlap.compute_slowdown, what runs beside compute"
    for lane, seconds in sorted(exposed_by_lane(whole).items(), key=lambda item: -item[1]):
        yield f"exposed {lane}", "communication", seconds, "links, what hides behind compute"
    yield "frozen encoders", "job", alone_s - timeline.step_s, "encoders in the loop"
    yield "stragglers", "job", whole.step_s - alone_s, "spread.step_fraction, ranks"
