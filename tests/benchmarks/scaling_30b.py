"""Predicted: what overlap brings the 30B at 73,728 tokens on 6,144 GPUs, and how one sample scales over more GPUs.

    python tests/benchmarks/scaling_30b.py [--packages fa3] [--json FILE]

Nothing here is measured: the numbers are the cost model's, for the cluster ``grand-teton-h100`` with a plain install of
torch and Triton, and the packages that are stated. Communication cost is
1 - step(free network that takes no SM) / step(as it is), for the same program. Strong scaling holds one sample and lets
tp * cp grow from 4 to 32; the plan of every point is the best of its degrees without recompute choice (``selective``),
so that kept bytes can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.prices.compute import Compute
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.prices.played import PlayedStep, play_step
from cinemesh.perf_model.prices.timeline import play, price
from cinemesh.perf_model.report.explain import describe, mfu, terms
from cinemesh.perf_model.search.extrapolate import Extrapolation
from cinemesh.perf_model.search.few_blocks import FewBlocks
from cinemesh.perf_model.search.planner import search
from cinemesh.perf_model.search.request import LatentBucket, PricedPlan, Request
from cinemesh.perf_model.search.tune import tune

MODEL, LATENT, GPUS = "movie-gen-30b", (32, 96, 96), 6144
NAME = "grand-teton-h100"
CONFIG = preset(MODEL)
SCALING = ((1, 4), (2, 2), (4, 1), (2, 4), (4, 2), (2, 6), (4, 3), (2, 8), (4, 4), (4, 6), (2, 16), (4, 8), (8, 4))


@dataclass(frozen=True)
class Row:
    """One plan of the first table. Seconds; shares of the step."""

    name: str
    plan: str
    step_s: float
    communication_cost: float
    exposed: float
    mfu: float


@dataclass(frozen=True)
class Point:
    """One point of the scaling table. ``step_scaling`` and ``kept_scaling``: against tp * cp = 4, 1 is ideal.

    ``nic``: the part of the step in which the NICs carry bytes at their full rate. ``limits``: by what the step is
    longer than that of the first point over tp * cp, in shares of the step, the largest first: kernels that fill the
    SMs less well, compute slowed by collectives, and exposed collectives by lane.
    """

    tp: int
    cp: int
    plan: str
    step_s: float
    step_scaling: float
    compute_s: float
    kept_bytes: int
    kept_scaling: float
    transient_bytes: int
    exposed: float
    nic: float
    limits: dict[str, float]


def lost(played: PlayedStep, first: PlayedStep) -> dict[str, float]:
    """Shares of a step that the first point's step, split over more ranks, would not have."""
    fewer = played.plan.tp * played.plan.cp / (first.plan.tp * first.plan.cp)
    ideal = terms(first)
    more = {name: seconds - ideal.get(name, 0.0) / fewer for name, seconds in terms(played).items()}
    shares = {name: seconds / played.step_s for name, seconds in more.items()}
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 0.002}


def nic_share(played: PlayedStep) -> float:
    """Seconds that the bytes of all collectives over NICs take alone, over those of the step."""
    costs = (record.cost for record in played.tape.records)
    return sum(cost.transfer_s for cost in costs if cost.link == "nic") / played.step_s


def row(name: str, plan: Plan, cluster: Cluster) -> Row:
    played = play_step(CONFIG, plan, BatchShape(1, LATENT), cluster)
    free = play(price(played.program, Compute(cluster), None, cluster)).step_s
    step = played.timeline.step_s
    return Row(
        name,
        describe(plan),
        played.step_s,
        1.0 - free / step,
        played.timeline.total_exposed_s / step,
        mfu(played, cluster),
    )


def overlapped(request: Request) -> PricedPlan:
    return tune(request, search(request).best)


def table(cluster: Cluster) -> list[Row]:
    """The planner's plan and the paper's TP4 CP2, with every overlap off and as the planner sets them."""
    rows: list[Row] = []
    asked: tuple[tuple[str, dict[str, object]], ...] = (("planner's", {}), ("paper's TP4 CP2", {"tp": 4, "cp": 2}))
    for name, fixed in asked:
        request = Request(CONFIG, (LatentBucket(LATENT),), cluster, GPUS, shown=5, fixed=fixed)
        choices = [tune(request, choice) for choice in search(request).choices]
        best = min(choices, key=lambda c: c.step_s / c.global_batch)
        plan = best.plan
        off = Plan(plan.tp, plan.cp, plan.dp_shard, plan.dp_replicate, recompute=plan.recompute, prefetch=0)
        off = replace(off, order=plan.order, recompute_last=plan.recompute_last, last_blocks=plan.last_blocks)
        rows += [row(f"{name}, no overlap", off, cluster), row(f"{name}, overlapped", best.plan, cluster)]
    return rows


def scaling(cluster: Cluster) -> list[Point]:
    points: list[Point] = []
    base: tuple[PlayedStep, int, int] | None = None
    for tp, cp in SCALING:
        request = Request(
            CONFIG,
            (LatentBucket(LATENT),),
            cluster.with_(**{"memory.usable_bytes": 1e12}),
            GPUS,
            shown=1,
            fixed={"tp": tp, "cp": cp, "recompute": "selective"},
        )
        best = overlapped(request)
        pure = replace(best.plan, recompute_last=None, last_blocks=0)
        few = FewBlocks.build(CONFIG, pure, BatchShape(1, LATENT))
        kept = Extrapolation(few, pure, PriceModels.of(cluster)).kept_bytes * CONFIG.layers
        played = play_step(CONFIG, best.plan, BatchShape(1, LATENT), cluster)
        ranks = tp * cp
        if base is None:
            base = (played, kept, ranks)
        transient = sum(
            played.footprint.by_class.get(name, 0) for name in ("transients", "gathered units", "unit gradients")
        )
        points.append(
            Point(
                tp,
                cp,
                describe(best.plan),
                played.step_s,
                base[0].step_s * base[2] / (played.step_s * ranks),
                played.tape.compute_s,
                kept,
                base[1] * base[2] / (kept * ranks),
                transient,
                played.timeline.total_exposed_s / played.timeline.step_s,
                nic_share(played),
                lost(played, base[0]),
            )
        )
    return points


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write the numbers to a file")
    arguments.add_argument("--packages", default="", help="beside torch and Triton")
    given = arguments.parse_args()
    cluster = load(NAME, packages=given.packages)
    print("Predicted, not measured.\n")
    rows = table(cluster)
    print(f"{'plan':<32} {'step s':>8} {'communication':>14} {'exposed':>8} {'MFU':>6}")
    for r in rows:
        print(f"{r.name:<32} {r.step_s:8.3f} {r.communication_cost:14.1%} {r.exposed:8.1%} {r.mfu:6.1%}  {r.plan}")
    points = scaling(cluster)
    heads = ("tp", "cp", "step s", "scaling", "compute s", "kept GB", "scaling", "transient GB", "exposed", "NIC busy")
    print("\n" + " ".join(f"{head:>12}" for head in heads))
    for p in points:
        cells = (
            str(p.tp),
            str(p.cp),
            f"{p.step_s:.3f}",
            f"{p.step_scaling:.1%}",
            f"{p.compute_s:.3f}",
            f"{p.kept_bytes / 1e9:.2f}",
            f"{p.kept_scaling:.1%}",
            f"{p.transient_bytes / 1e9:.2f}",
            f"{p.exposed:.1%}",
            f"{p.nic:.0%}",
        )
        limits = ", ".join(f"{name} {share:.1%}" for name, share in p.limits.items())
        print(" ".join(f"{cell:>12}" for cell in cells), f" {limits}")
    if given.json:
        values = {
            "predicted": True,
            "cluster": cluster.name,
            "packages": cluster.software.packages,
            "model": MODEL,
            "gpus": GPUS,
            "plans": [asdict(r) for r in rows],
            "scaling": [asdict(p) for p in points],
        }
        given.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
