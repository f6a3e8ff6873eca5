"""What a model learns to predict, on which path from noise to data: the records of a step (torch-free).

An objective is data: ``ModelConfig.objective`` names one, and program, reference, sampler and validation ask it. What
it means in numbers stands in ``paths.py``. t = 0 is pure noise and t = 1 data, whatever the objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..parallel.ir.builder import Builder
from ..parallel.ir.records import Buffer

ObjectiveName = Literal["flow-matching", "v-prediction"]


class Objective(ABC):
    """How a step noises its samples, and what it compares the prediction with."""

    @abstractmethod
    def draw_time(self, b: Builder, drawn_for: Sequence[Buffer], **draw: Any) -> Buffer:
        """T [B], in the statistics dtype, for ids, places and counters."""

    @abstractmethod
    def noised(self, b: Builder, x1: Buffer, x0: Buffer, t: Buffer) -> tuple[Buffer, Buffer]:
        """x_t in the compute dtype, and the target, of data x1 and noise x0: all [T, B, P]."""


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Movie Gen 3.1.2: logit-normal t; x_t = t x1 + (1 - (1 - sigma_min) t) x0, target x1 - (1 - sigma_min) x0."""

    sigma_min: float = 1e-5  # 3.1.2

    def draw_time(self, b: Builder, drawn_for: Sequence[Buffer], **draw: Any) -> Buffer:
        return b.op("draw_time", drawn_for, "t", dtypes=b.plan.stat_dtype, **draw)[0]

    def noised(self, b: Builder, x1: Buffer, x0: Buffer, t: Buffer) -> tuple[Buffer, Buffer]:
        dtypes = b.plan.compute_dtype, b.plan.stat_dtype
        x_t, target = b.op("interpolate", [x1, x0, t], ("x_t", "target"), dtypes=dtypes, sigma_min=self.sigma_min)
        return x_t, target


@dataclass(frozen=True)
class VPrediction(Objective):
    """Diffusion of ``steps`` levels whose last has no signal; predicted is v = alpha x0 - sigma x1.

    Salimans and Ho 2022 (arXiv 2202.00512); zero terminal SNR: Lin et al. 2023 (arXiv 2305.08891). The betas are those
    of latent diffusion (Rombach et al. 2022), between whose roots steps are equal; Movie Gen 3.6.2 gives none.
    """

    steps: int = 1000
    first_beta: float = 0.00085
    last_beta: float = 0.012

    def draw_time(self, b: Builder, drawn_for: Sequence[Buffer], **draw: Any) -> Buffer:
        return b.op("draw_step", drawn_for, "t", dtypes=b.plan.stat_dtype, steps=self.steps, **draw)[0]

    def noised(self, b: Builder, x1: Buffer, x0: Buffer, t: Buffer) -> tuple[Buffer, Buffer]:
        dtypes = b.plan.compute_dtype, b.plan.stat_dtype
        levels: dict[str, Any] = {"steps": self.steps, "first_beta": self.first_beta, "last_beta": self.last_beta}
        x_t, target = b.op("diffuse", [x1, x0, t], ("x_t", "target"), dtypes=dtypes, **levels)
        return x_t, target


FLOW_MATCHING, V_PREDICTION = FlowMatching(), VPrediction()
OBJECTIVES: Mapping[ObjectiveName, Objective] = {"flow-matching": FLOW_MATCHING, "v-prediction": V_PREDICTION}
