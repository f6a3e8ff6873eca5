"""How the samples of a step are dealt out over data ranks and micro-batches (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .refusals import FamilyKey, Refusal, RefusalKind
from .space import Family, SearchSpace, divisors

# A step's program is written out, micro-batch by micro-batch: of the 30B under TP4 CP2 each adds 5,500 records (3,150
# kernels), 10.5 MB and 0.35 s of a core to the start of every rank (2026-11-29, 2-core x86-64), and all are nodes of a
# CUDA Graph. What a step does once is by then spread so thin that more micro-batches would save no 64th of it.
MOST_MICRO_BATCHES = 64
TOO_MANY = "a step is written out and captured with every one of them"


def dealt(space: SearchSpace, tp: int, cp: int, refused: list[Refusal]) -> Iterator[Family]:
    """Families of one (tp, cp): how the samples of a step are dealt out."""
    request = space.request
    data_ranks = request.gpus // (tp * cp)
    fixed = request.fixed
    if request.global_batch is None:
        micro_batches = int(fixed.get("micro_batches", 1))  # type: ignore[arg-type]
        yield Family(space, FamilyKey(tp, cp, request.samples, micro_batches))
        return
    if request.global_batch % data_ranks:
        rule = f"global batch({request.global_batch}) % data ranks({data_ranks}) != 0"
        refused.append(Refusal(RefusalKind.DIVIDES, FamilyKey(tp, cp), rule))
        return
    share = request.global_batch // data_ranks
    for micro_batches in divisors(share):
        key = FamilyKey(tp, cp, share // micro_batches, micro_batches)
        if fixed.get("micro_batches", micro_batches) != micro_batches:
            continue
        if "micro_batches" not in fixed and micro_batches > MOST_MICRO_BATCHES and _may_fit(Family(space, key)):
            rule = f"micro_batches({micro_batches}) > {MOST_MICRO_BATCHES}: {TOO_MANY}"
            refused.append(Refusal(RefusalKind.MICRO_BATCHES, key, rule))
            return
        yield Family(space, key)


def _may_fit(family: Family) -> bool:
    """Whether no bound tells that a family needs too much memory."""
    recompute: Any = family.request.fixed.get("recompute", "full")
    return family.least_bytes(recompute) <= family.evaluator.limit_bytes(family.plan)
