"""Predicted: what keeps the tuned 30B at 73,728 tokens on 6,144 GPUs from the MFU that its kernels would allow.

    python tests/benchmarks/gap_30b.py [--json FILE]

Nothing here is measured. The waterfall of the plan that `plan --gpus 6144 --tune --packages fa3` prints, then the same
program played without each cause: as if its constants cost nothing, or with other ones. What stragglers and the clock
rest on is held against published runs: errors of the cost model as it is, with half the stragglers, and with attention
at the clock of a short kernel. Minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.clusters.schema import PassConstants
from cinemesh.perf_model.prices.played import PlayedStep, play_program, play_step
from cinemesh.perf_model.prices.timeline import play
from cinemesh.perf_model.published import validate
from cinemesh.perf_model.published.rows import TRUSTED
from cinemesh.perf_model.report.exchanges import Exchange, exchanges
from cinemesh.perf_model.report.explain import describe, mfu
from cinemesh.perf_model.report.float8 import Float8, float8
from cinemesh.perf_model.report.waterfall import Loss, waterfall
from cinemesh.perf_model.search.planner import search
from cinemesh.perf_model.search.request import LatentBucket, Request
from cinemesh.perf_model.search.tune import tuned

CONFIG, LATENT, GPUS = preset("movie-gen-30b"), (32, 96, 96), 6144
SIZES = (1, 64, 256, 4096)  # GPUs of published runs, from and below
LONG = 32768  # tokens


@dataclass(frozen=True)
class Without:
    """The step without a cause; ``ours``: whether this project's code could take it away."""

    cause: str
    ours: bool
    step_s: float
    mfu: float


@dataclass(frozen=True)
class Errors:
    """Predicted over measured, less one, of published steps (trust A), under a change of the constants."""

    change: str
    of: str
    rows: int
    mean: float
    mean_abs: float


Change = Callable[[Cluster], Cluster]


def free_links(cluster: Cluster) -> Cluster:
    return cluster.with_(nic_scale=1e3, nvlink_scale=1e3)


def no_slowdown(cluster: Cluster) -> Cluster:
    return cluster.with_(**{"overlap.compute_slowdown": 0.0})


def no_stragglers(cluster: Cluster) -> Cluster:
    return cluster.with_(**{"spread.step_fraction": 0.0})


def cross_on_fa3(cluster: Cluster) -> Cluster:
    """Cross-attention has a key mask, so it runs on our Triton, whose rates are a guess."""
    return replace(cluster, attention={**cluster.attention, "triton": cluster.attention["fa3"]})


def even_waves(cluster: Cluster) -> Cluster:
    fa3 = cluster.attention["fa3"]
    forward, backward = (replace(law, tail=0.0, prologue_s=0.0) for law in (fa3.forward, fa3.backward))
    return replace(cluster, attention={**cluster.attention, "fa3": replace(fa3, forward=forward, backward=backward)})


def without_recompute(step: PlayedStep, cluster: Cluster) -> float:
    """Seconds of the step where what is made again costs no compute."""
    again = [i for i, op in enumerate(step.program.ops) if op.clone and step.tape.records[i].computes]
    tape = step.tape.with_records({i: replace(step.tape.records[i], seconds=0.0, alone_s=0.0) for i in again})
    return play(tape).step_s * cluster.spread.factor(step.plan.world_size)


def causes(step: PlayedStep, cluster: Cluster) -> Iterator[Without]:
    """The step without each, and without all of a kind."""

    def played(cause: str, *changes: Change, ours: bool = True, recompute: bool = True) -> Without:
        changed = cluster
        for change in changes:
            changed = change(changed)
        there = play_program(step.program, step.batch, changed)
        if not recompute:
            there = replace(there, step_s=without_recompute(there, changed))
        return Without(cause, ours, there.step_s, mfu(there, changed))

    mine = cross_on_fa3, no_slowdown, free_links
    yield played("nothing")
    yield played("stragglers", no_stragglers, ours=False)
    yield played("prologues and last waves of FlashAttention 3", even_waves, ours=False)
    yield played("slowdown by collectives", no_slowdown)
    yield played("cross-attention below FlashAttention 3's rates", cross_on_fa3)
    yield played("recompute", recompute=False)
    yield played("exposed collectives", free_links)
    yield played("all that is ours", *mine, recompute=False)
    yield played("all that is ours, and stragglers", *mine, no_stragglers, ours=False, recompute=False)


def full_clock_in_attention(cluster: Cluster) -> Cluster:
    """Attention as fast as a short kernel alone: its rates are divided by the part of the clock that is sustained."""
    gpu = cluster.gpu.sustained["bfloat16"]

    def faster(law: PassConstants) -> PassConstants:
        return replace(law, speed={dim: speed / gpu for dim, speed in law.speed.items()})

    families = {
        name: replace(family, forward=faster(family.forward), backward=faster(family.backward))
        for name, family in cluster.attention.items()
    }
    return replace(cluster, attention=families)


def half_the_stragglers(cluster: Cluster) -> Cluster:
    return cluster.with_(**{"spread.step_fraction": cluster.spread.step_fraction / 2})


def errors() -> Iterator[Errors]:
    """By the number of GPUs and the tokens of a sample."""
    rows = {row["id"]: row for row in validate.read(validate.ROWS)}
    changes: dict[str, Change | None] = {
        "none": None,
        "attention at the clock of a short kernel": full_clock_in_attention,
        "half the stragglers": half_the_stragglers,
    }
    for change, changed in changes.items():
        found = [
            (rows[p.id]["hardware"]["gpus"], rows[p.id]["model"].get("seq", 0), p.error)
            for p in validate.validate(change=changed).times
            if p.kind == "training_step" and p.trust in TRUSTED and not p.assumed
        ]
        picked = {"all": [error for _, _, error in found]}
        picked |= {
            f"{low} to {high - 1} GPUs": [e for n, _, e in found if low <= n < high] for low, high in pairwise(SIZES)
        }
        picked[f"{LONG} tokens and more"] = [error for _, tokens, error in found if tokens >= LONG]
        for of, some in picked.items():
            yield Errors(change, of, len(some), statistics.mean(some), statistics.mean(map(abs, some)))


def printed(losses: list[Loss], found: list[Without], ways: list[Exchange], in_fp8: list[Float8]) -> None:
    for loss in losses:
        print(f"{loss.name:<50} {loss.seconds:8.4f} s {loss.share:7.2%} {loss.ceiling:7.2%}")
    print("\nwithout")
    for one in found:
        print(f"{one.cause:<50} {one.step_s:8.4f} s {one.mfu:7.2%}  {'ours' if one.ours else 'not ours'}")
    for way in (*ways, *in_fp8):
        print(f"{way.name:<50} {way.step_s:8.4f} s {way.gain:+7.2%}  {way.problem or 'not runnable here'}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write the numbers to a file")
    given = arguments.parse_args()
    cluster = load("grand-teton-h100", packages="fa3")
    request = Request(CONFIG, (LatentBucket(LATENT),), cluster, GPUS, shown=1)
    plan = tuned(request, search(request)).best.plan
    step = play_step(CONFIG, plan, BatchShape(1, LATENT), cluster)
    print(f"Predicted, not measured: {describe(plan)}, {step.step_s:.4f} s, MFU {mfu(step, cluster):.2%}\n")
    losses, found = waterfall(step, cluster), list(causes(step, cluster))
    ways, in_fp8, wrong = exchanges(step, CONFIG, cluster), float8(step, cluster), list(errors())
    printed(losses, found, ways, in_fp8)
    for one in wrong:
        print(
            f"{one.change:<42} {one.of:<26} {one.rows:4} rows: {one.mean:+6.1%}, {one.mean_abs:6.1%} in absolute terms"
        )
    if given.json:
        values = {
            "predicted": True,
            "date": date.today().isoformat(),
            "cluster": cluster.name,
            "packages": cluster.software.packages,
            "plan": plan.to_dict(),
            "step_s": step.step_s,
            "mfu": mfu(step, cluster),
            "waterfall": [asdict(row) for row in losses],
            "without": [asdict(row) for row in found],
            "exchanges": [asdict(row) for row in ways],
            "float8": [asdict(row) for row in in_fp8],
            "errors": [asdict(row) for row in wrong],
        }
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
