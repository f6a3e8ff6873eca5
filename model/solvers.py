"""Times and solvers of the sampler: where along t the velocity is asked, and how it is followed (torch-free).

k_i = v(x + h * sum_j a_ij k_j, t + c_i h),   x <- x + h * sum_i b_i k_i,   h from one time to the next
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

PAPER_STEPS = 50  # 3.4.2
EMULATED_STEPS = 250  # 3.4.2: 50 linear-quadratic steps stand for 250 linear ones


def linear_quadratic(steps: int, emulated: int = EMULATED_STEPS) -> list[float]:
    """The ``steps`` + 1 times from 0 to 1: first half those of an ``emulated``-step linear schedule, then quadratic.

    With L = steps // 2 and Q = steps - L:  t_i = i / N + (1 - steps / N) * (max(0, i - L) / Q)**2.  At the join, value
    and slope are the linear part's. For an odd ``steps`` the quadratic part has one step more; at ``steps`` >= N there
    is nothing to emulate and all steps are equal. The paper gives words and a figure; this is the reading of the
    public implementations (Mochi, diffusers), whose threshold tau is L / N.
    """
    assert steps >= 1
    emulated = max(emulated, steps)
    linear = steps // 2
    bend = 1 - steps / emulated
    times = [i / emulated + bend * (max(0, i - linear) / (steps - linear)) ** 2 for i in range(steps)]
    return [*times, 1.0]


def equal_steps(steps: int) -> list[float]:
    """As far from one time to the next."""
    return [i / steps for i in range(steps + 1)]


ScheduleName = Literal["linear-quadratic", "linear"]
SCHEDULES: Mapping[ScheduleName, Callable[[int], list[float]]] = {
    "linear-quadratic": linear_quadratic,
    "linear": equal_steps,
}


@dataclass(frozen=True)
class Solver:
    """An explicit Runge-Kutta method of fixed steps: c, a and b above; a velocity for each of ``nodes``."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


SolverName = Literal["euler", "midpoint", "dopri5"]
SOLVERS: Mapping[SolverName, Solver] = {
    "euler": Solver((0.0,), ((),), (1.0,)),
    "midpoint": Solver((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "dopri5": Solver(  # Dormand and Prince 1980, the solution of order 5
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}
