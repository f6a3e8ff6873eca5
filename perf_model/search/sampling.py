"""How long a clip takes to sample on so many GPUs: every way to share it, priced and played (torch-free).

A guided velocity is two, with the caption and without it: both in one batch on all ranks, or one each on two groups of
ranks, which exchange what they made. Not counted: text encoders and the decoding of the clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...errors import CinemeshError
from ...model.config import ModelConfig
from ...model.forward import build_velocity
from ...model.inputs import BatchShape
from ...model.step import check
from ...parallel.ir.fields import DtypePolicy
from ...parallel.ir.plan import Plan
from ...parallel.passes.pipeline import prepare
from ..prices.models import PriceModels
from ..prices.played import play_program

Guidance = Literal["batch", "groups"]


@dataclass(frozen=True)
class SampledClip:
    """One clip under a plan: seconds of a guided velocity and of all of them, and what it waits and holds."""

    plan: Plan
    guidance: Guidance
    velocity_s: float
    clip_s: float
    exposed_s: float
    peak_bytes: int
    fits: bool


def ways(gpus: int, dtype: DtypePolicy) -> Iterator[tuple[Plan, Guidance]]:
    """Every tp and cp over all GPUs, or over each half of them; weights are sharded over cp."""
    groups: tuple[tuple[int, Guidance], ...] = ((1, "batch"), (2, "groups"))
    for replicas, guidance in groups:
        ranks = gpus // replicas
        if gpus % replicas:
            continue
        for tp in range(1, ranks + 1):
            if ranks % tp == 0:
                yield Plan(tp=tp, cp=ranks // tp, dp_replicate=replicas, dtype=dtype), guidance


def price_clips(
    config: ModelConfig, latent: tuple[int, int, int], models: PriceModels, gpus: int, dtype: DtypePolicy, steps: int
) -> list[SampledClip]:
    """One guided clip by ``steps`` velocities, the fastest way that fits first; then those that do not fit.

    Raises CinemeshError where no way divides model and latent.
    """
    found: list[SampledClip] = []
    refused = ""
    for plan, guidance in ways(gpus, dtype):
        batch = BatchShape(2 if guidance == "batch" else 1, latent)
        try:
            check(config, plan, batch)
        except CinemeshError as error:
            refused = error.problem
            continue
        built = build_velocity(config, plan, batch, apart=guidance == "groups")
        played = play_program(prepare(built, backend=models.cluster.backend), batch, models)
        needs = played.footprint
        found.append(
            SampledClip(
                plan,
                guidance,
                played.step_s,
                steps * played.step_s,
                played.timeline.total_exposed_s,
                needs.peak_bytes,
                needs.peak_bytes <= needs.limit_bytes,
            )
        )
    if not found:
        raise CinemeshError(f"no tp and cp over {gpus} GPUs divide the model and the latent: {refused}")
    return sorted(found, key=lambda clip: (not clip.fits, clip.clip_s))
