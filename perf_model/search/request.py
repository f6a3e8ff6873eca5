"""What the planner is asked, and a plan that it answers with (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ...model.config import ModelConfig
from ...model.inputs import BatchShape
from ...parallel.ir.fields import DtypePolicy
from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from ..prices.encoders import FrozenCost, LoopEncoders
from .few_blocks import Programs
from .refusals import FamilyKey

SHOWN = 5  # families ranked


@dataclass(frozen=True)
class LatentBucket:
    """A sample shape: latent (T, H, W), and its share of the steps, which have ``times`` the request's samples."""

    latent: tuple[int, int, int]
    weight: float = 1.0
    times: int = 1


def buckets_of_batches(
    latents: Sequence[tuple[int, int, int]], weights: Sequence[float], batches: Sequence[int]
) -> tuple[tuple[LatentBucket, ...], int]:
    """Buckets whose steps have these samples, and the request's global batch for that; those of one shape are one."""
    common = math.gcd(*batches)  # ranks and micro-batches divide it where they divide every batch
    shares: dict[tuple[tuple[int, int, int], int], float] = {}
    for latent, weight, batch in zip(latents, weights, batches, strict=True):
        shares[latent, batch // common] = shares.get((latent, batch // common), 0.0) + weight
    return tuple(LatentBucket(latent, weight, times) for (latent, times), weight in shares.items()), common


@dataclass(frozen=True)
class Request:
    """What to plan for.

    ``fixed`` holds plan fields that are given by hand; ``samples`` those of one micro-batch on one data rank, used when
    no global batch is asked for; ``encoders``: text encoders that run in the loop. ``programs``: built for this request
    and for those that were made from it.
    """

    config: ModelConfig
    buckets: tuple[LatentBucket, ...]
    cluster: Cluster
    gpus: int
    global_batch: int | None = None
    samples: int = 1
    dtype: DtypePolicy = "bf16"
    fixed: dict[str, object] = field(default_factory=dict)
    encoders: LoopEncoders | None = None
    shown: int = SHOWN
    prune: bool = True
    programs: Programs = field(default_factory=Programs, compare=False, repr=False)

    def batches(self, samples: int) -> list[BatchShape]:
        """A data rank's micro-batch of every bucket."""
        return [BatchShape(samples * bucket.times, bucket.latent) for bucket in self.buckets]

    def batch_text(self, global_batch: int) -> str:
        """Samples of a step, in words; of each bucket, where they differ."""
        return " + ".join(dict.fromkeys(f"{bucket.times * global_batch:,}" for bucket in self.buckets))

    @property
    def mean_times(self) -> float:
        """Samples of a mean step over those of ``global_batch``."""
        return sum(b.weight * b.times for b in self.buckets) / sum(b.weight for b in self.buckets)


class Timed(StrEnum):
    """What a step's time was made from."""

    SHARED = "a few blocks that serve many plans"
    STEADY = "a few blocks of its own, whose records are shown to repeat, played until nothing changes"
    PLAYED = "every record of every block, played"


@dataclass(frozen=True)
class PricedPlan:
    """One plan with its price. ``step_s`` is the mean over the buckets by weight; bytes are of one rank.

    ``exposed_s``: of the step, the seconds in which compute waits for collectives. ``hardware_flops``: of the matrix
    products of one rank's step, 0 until its own program was priced. ``searched_s``: what the search took for the step
    before that. ``mean_times``, ``bucket_s``: the request's, and a step of each bucket, where buckets are several.
    """

    plan: Plan
    samples: int
    step_s: float
    compute_s: float
    bound_s: float
    peak_bytes: int
    global_batch: int
    exposed_s: float = 0.0
    hardware_flops: float = 0.0
    frozen: FrozenCost | None = None
    timed: Timed = Timed.SHARED
    searched_s: float = 0.0
    mean_times: float = 1.0
    bucket_s: tuple[float, ...] = ()

    @property
    def samples_per_s(self) -> float:
        return self.mean_times * self.global_batch / self.step_s

    @property
    def per_sample_s(self) -> float:
        return self.step_s / self.global_batch

    @property
    def beside_compute(self) -> float:
        """Share of the step that compute alone does not explain."""
        return 1.0 - self.compute_s / self.step_s

    @property
    def exposed_fraction(self) -> float:
        """Share of the step in which compute waits for collectives."""
        return self.exposed_s / self.step_s

    @property
    def family(self) -> FamilyKey:
        return FamilyKey(self.plan.tp, self.plan.cp, self.samples, self.plan.micro_batches)
