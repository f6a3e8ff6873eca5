"""What an objective means in numbers: the noised sample, the target, a step of the sampler.

Flow matching is that of ``flow.py``. A path of v-prediction has levels alpha_n and sigma_n of n = 0 ... N steps of
noise, alpha^2 + sigma^2 = 1, alpha_0 = 1 and alpha_N = 0, at t = 1 - n / N:

    x_t = alpha x1 + sigma x0        v = alpha x0 - sigma x1
    x1 = alpha x_t - sigma v         x0 = sigma x_t + alpha v

Samples, data and noise are [B, ...], t is [B], in the dtype of the samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import CinemeshError
from ..kernels.philox import Purpose, uniform
from . import flow
from .objective import OBJECTIVES, V_PREDICTION, ObjectiveName, VPrediction
from .solvers import SCHEDULES, SOLVERS, ScheduleName, Solver, SolverName

Predict = Callable[[Tensor, float], Tensor]  # of a sample at t


class Path(ABC):
    """One objective."""

    @abstractmethod
    def draw_time(self, seed: int, step: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        """T of training, float64 [B]; arguments as of ``flow.draw_time``."""

    @abstractmethod
    def noised(self, x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target) of data and noise."""

    @abstractmethod
    def advanced(self, x: Tensor, t: float, after: float, predict: Predict, solver: Solver) -> Tensor:
        """The sample at ``after`` of that at t: a step of the sampler."""

    def followed(
        self, x: Tensor, times: Sequence[float], solver: Solver, predict: Predict, watch: Callable[[int], None]
    ) -> Tensor:
        """x at the last of ``times`` from x at the first. ``watch``: told the step that begins, from 0."""
        for step, (t, after) in enumerate(pairwise(times)):
            watch(step)
            x = self.advanced(x, t, after, predict, solver)
        return x

    @abstractmethod
    def times(self, schedule: ScheduleName, steps: int) -> list[float]:
        """Of a sampler, from 0 to 1."""

    @abstractmethod
    def check_sampler(self, solver: SolverName, steps: int) -> None:
        """Raises CinemeshError for what this path cannot be followed by."""


class FlowPath(Path):
    """Straight lines: their velocity is predicted, and any solver follows it."""

    def draw_time(self, seed: int, step: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        return flow.draw_time(seed, step, ids, places)

    def noised(self, x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return flow.interpolate(x1, x0, t)

    def advanced(self, x: Tensor, t: float, after: float, predict: Predict, solver: Solver) -> Tensor:
        h, ks = after - t, list[Tensor]()
        for node, row in zip(solver.nodes, solver.rows, strict=True):
            ks.append(predict(_moved(x, h, row, ks), t + node * h))
        return _moved(x, h, solver.weights, ks)

    def times(self, schedule: ScheduleName, steps: int) -> list[float]:
        return SCHEDULES[schedule](steps)

    def check_sampler(self, solver: SolverName, steps: int) -> None:
        """Nothing is refused."""


class DiffusionPath(Path):
    """Levels of noise, followed by DDIM (Song et al. 2021): the data and the noise of a prediction, mixed anew.

    It begins at n = N, where alpha is 0 and x_t is noise alone, and nowhere divides by alpha.
    """

    def __init__(self, objective: VPrediction) -> None:
        self.objective = objective

    @cached_property
    def signal(self) -> Tensor:
        """Alpha of n = 0 ... N, float64."""
        o = self.objective
        return torch.cat([torch.ones(1, dtype=torch.float64), zero_terminal(o.steps, o.first_beta, o.last_beta)])

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float64 [B]."""
        n = ((1 - t.double()) * self.objective.steps).round().long()
        alpha = self.signal.to(t.device)[n]
        return alpha, (1 - alpha.square()).sqrt()

    def draw_time(self, seed: int, step: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        """N uniform in 1 ... N."""
        drawn = uniform(seed, Purpose.TIME, step, ids, torch.zeros_like(ids), places)
        return 1 - ((drawn * self.objective.steps).floor() + 1) / self.objective.steps

    def noised(self, x1: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (_wide(level, x1) for level in self.levels(t))
        return alpha * x1 + sigma * x0, alpha * x0 - sigma * x1

    def advanced(self, x: Tensor, t: float, after: float, predict: Predict, solver: Solver) -> Tensor:
        del solver  # ``check_sampler``: one prediction a step
        (alpha, next_alpha), (sigma, next_sigma) = self.levels(torch.tensor([t, after], dtype=torch.float64))
        v = predict(x, t)
        data, noise = alpha.item() * x - sigma.item() * v, sigma.item() * x + alpha.item() * v
        return next_alpha.item() * data + next_sigma.item() * noise

    def times(self, schedule: ScheduleName, steps: int) -> list[float]:
        """The levels next to the schedule's times. Equal steps are the trailing ones of Lin et al. 2023, 3.3."""
        levels = self.objective.steps
        return [1 - round((1 - t) * levels) / levels for t in SCHEDULES[schedule](steps)]

    def check_sampler(self, solver: SolverName, steps: int) -> None:
        if SOLVERS[solver] is not SOLVERS["euler"]:
            raise CinemeshError(
                f"sample.solver is {solver}, and a model of v-prediction is sampled by DDIM, one prediction a step",
                remedy="say solver: euler",
            )
        if steps > self.objective.steps:
            raise CinemeshError(
                f"sample.steps({steps}) > {self.objective.steps}, the levels of noise of v-prediction",
                remedy=f"take {self.objective.steps} or fewer",
            )


def zero_terminal(steps: int, first_beta: float, last_beta: float) -> Tensor:
    """Alpha of n = 1 ... N, float64: Lin et al. 2023, algorithm 1, on betas whose roots are equally spaced."""
    first, last = first_beta**0.5, last_beta**0.5
    roots = first + (last - first) * torch.arange(steps, dtype=torch.float64) / (steps - 1)
    alpha = torch.exp(0.5 * torch.log1p(-roots.square()).cumsum(0))
    return (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))


def _wide(of_samples: Tensor, x: Tensor) -> Tensor:
    return of_samples.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _moved(x: Tensor, h: float, shares: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """x + h * sum of shares * ks."""
    for share, k in zip(shares, ks, strict=True):
        if share:
            x = x + (h * share) * k
    return x


DIFFUSION = DiffusionPath(V_PREDICTION)
PATHS: Mapping[ObjectiveName, Path] = {"flow-matching": FlowPath(), "v-prediction": DIFFUSION}
assert PATHS.keys() == OBJECTIVES.keys()
