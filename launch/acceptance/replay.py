"""Stage 3: steps captured and replayed, on all ranks, beside the same steps run record by record.

Both begin from the same weights and take the same samples. On a CPU, where a replay makes the same calls, every state
must be bitwise what it was. On GPUs kernels are those that sum in one order; NCCL may choose another algorithm in a
graph (it registers its buffers), so that sums may be rounded otherwise: then the first step's loss, gradient norm and
first moment may differ by twice what parity grants a step of one of them.

Steps are captured whatever NCCL and the driver make of the order of captured collectives; where ``capture: auto`` would
leave it, or collectives run one after another, the findings say so and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CinemeshError
from ...model.runner import StepRunner
from ...model.weights import probe_values
from ...parallel.runtime.comm import gather_objects, nccl_stack
from ..cluster.processes import Joined
from ..proof.bounds import rounding
from ..proof.parity import LR, Case, load_batch
from .here import SAID, Here, mesh_of
from .steps import device_kind, plans_of, proof_case, runner_of

STEPS = 3
STATES = ("master", "exp_avg", "exp_avg_sq", "ema", "counters")
LINEAR = "exp_avg"  # of the first step: the clipped gradient times a constant


@dataclass
class RanSteps:
    """What steps left behind: loss and norm of each; states behind the first and the last."""

    numbers: list[tuple[float, float]]
    first: dict[str, Tensor]
    last: dict[str, Tensor]


def run(here: Here) -> None:
    """Every plan eager and replayed."""
    with here.joined() as place:
        on_gpu = device_kind(place.device) == "cuda"
        if on_gpu:
            stack = nccl_stack()
            here.note(auto_captures=stack.captures("auto"), serial=stack.serial(captured=True), lost=stack.told())
        rows: list[dict[str, Any]] = []
        for name, plan in plans_of(here.world, here.local).items():
            case = proof_case(plan, place.device, STEPS, "float32")
            here.at(f"{name}: {plan.equation()}")
            row = {"name": name, "plan": plan.equation(), **_compared(place, case)}
            rows.append(row)
            if row["failed"]:
                here.fault(f"{name}: not captured: {row['failed']}")
            elif not (row["bitwise"] or (on_gpu and row["worst"] <= row["bound"])):
                here.fault(f"{name}: replayed and eager steps differ by {row['worst']:.1e} on rank {row['rank']}")
            bitwise = sum(row["bitwise"] for row in rows)
            here.note(plans=rows, **{SAID: f"{bitwise} of {len(rows)} plans replay bitwise as they ran"})


def _compared(place: Joined, case: Case) -> dict[str, Any]:
    """Of all ranks, the one that differs most."""
    with mesh_of(case.plan, place) as mesh:
        runner = runner_of(case, mesh, place.device, deterministic=True)
        eager = steps_of(case, runner)
        runner.initialise(probe_values(case.seed))
        try:
            runner.capture("required")
        except CinemeshError as error:  # of a vote: every rank has it
            return {"failed": str(error), "bitwise": False, "worst": 0.0, "bound": 0.0, "rank": 0}
        replayed = steps_of(case, runner)
        everyones: Any = gather_objects(replay_difference(eager, replayed))
    worst, rank = max((of["worst"], rank) for rank, of in enumerate(everyones))
    bitwise = all(of["bitwise"] for of in everyones)
    return {"failed": "", "bitwise": bitwise, "worst": worst, "bound": 2 * rounding(case), "rank": rank}


def steps_of(case: Case, runner: StepRunner) -> RanSteps:
    """Run the steps of a case, as the runner runs them."""

    def states() -> dict[str, Tensor]:
        return {name: runner.buffers[name].clone() for name in STATES}

    numbers: list[tuple[float, float]] = []
    first: dict[str, Tensor] = {}
    for step in range(case.steps):
        load_batch(case, runner, step)
        runner.step(LR)
        numbers.append((runner.loss.item(), runner.gradient_norm.item()))
        first = first or states()
    return RanSteps(numbers, first, states())


def replay_difference(a: RanSteps, b: RanSteps) -> dict[str, Any]:
    """Whether all is bitwise the same; and ``worst``: max|a - b| / max|b| of the first step's numbers and moments."""
    states = ((a.first, b.first), (a.last, b.last))
    same = all(torch.equal(left[name], right[name]) for left, right in states for name in STATES)
    pairs = [(torch.tensor(x), torch.tensor(y)) for x, y in zip(a.numbers[0], b.numbers[0], strict=True)]
    pairs.append((a.first[LINEAR], b.first[LINEAR]))
    worst = max(((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item() for x, y in pairs)
    return {"bitwise": same and a.numbers == b.numbers, "worst": worst}
