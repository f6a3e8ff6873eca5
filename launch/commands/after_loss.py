"""A run that has lost ranks, foretold: what the planner has for those that are left, beside what it had for all."""

from __future__ import annotations

from ...data.batches import batches_told
from ...errors import CinemeshError
from ..training.recipe import Auto
from ..training.resolve import planned
from ..training.resolved import Resolved
from ..training.setting import Setting
from .reply import AfterLoss


def planned_after_loss(before: Resolved, lost: int, auto: Auto, setting: Setting) -> tuple[Resolved, AfterLoss]:
    """The plan of the ranks that are left. Raises CinemeshError where none is, and where no plan fits those."""
    ranks, data = before.plan.world_size, setting.config.data
    if not 0 < lost < ranks:
        raise CinemeshError(f"--lost {lost} of {ranks} ranks", remedy="some must be left", what="lost", value=lost)
    left = planned(ranks - lost, auto, setting, ranks)

    def samples_per_s(of: Resolved) -> float:
        weights = data.step_weights
        return sum(w * size for w, size in zip(weights, of.global_batches, strict=True)) / sum(weights) / of.step_s

    return left, AfterLoss(
        full_ranks=ranks,
        batches=batches_told(left.global_batches, tuple(data.global_batches)),
        samples_per_s=samples_per_s(left),
        full_samples_per_s=samples_per_s(before),
        of_proportional=samples_per_s(left) / samples_per_s(before) * ranks / left.plan.world_size,
    )


def loss_told(after: AfterLoss, ranks: int) -> str:
    """In a line."""
    return (
        f"{ranks:,} of {after.full_ranks:,} ranks are left: a step takes {after.batches}, {after.samples_per_s:.4g} "
        f"samples/s of {after.full_samples_per_s:.4g} before, which is {after.of_proportional:.2%} of their share"
    )
