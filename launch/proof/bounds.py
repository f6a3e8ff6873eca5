"""The verdict on a plan: how far what it computed is from the reference, and how far rounding alone may bring it.

[Note: bounds] An error is measured against the largest element wanted, but not of a tensor that all but vanishes: where
a softmax is one-hot, the gradient of its queries is a sum that cancels, of terms as large as other gradients. So
nothing is measured against less than a hundredth of the largest of its step, which few tensors of these shapes are
below. Where zeros in place of a gradient would pass in every step, the check is blind and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .parity import Case, Named, RankRun, Trajectory, run_rank, run_reference, starting_weights, whole

FLOAT64_BOUND = 1e-10  # the design's
SMALL = 1e-2  # of its step's largest: an error of what is smaller is measured against that
FIRST_GRADIENT = "final.weight"  # the head's: the error of the velocity times what the head read
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bf16": 2.0**-9}
QUANTITIES = ("loss", "gradient", "weight")


@dataclass
class Worst:
    """The largest relative errors met, and where."""

    error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0.0))
    where: dict[str, str] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, ""))

    def note(self, what: str, where: str, got: Tensor | float, want: Tensor | float, largest: float = 0.0) -> None:
        """max|a - b| over the scale of b: see [Note: bounds]. ``largest``: of its step."""
        got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
        difference, scale = (got - want).abs().max().item(), scale_of(want, largest)
        error = difference / scale if scale else math.inf if difference else 0.0
        if not error <= self.error[what]:  # a NaN is the worst
            self.error[what], self.where[what] = error, where

    def note_gradients(self, ran: Trajectory, reference: Trajectory) -> None:
        for step, wanted in enumerate(reference.gradients):
            largest = largest_of(wanted)
            for name, gradient in wanted.items():
                self.note("gradient", f"{name}, step {step}", ran.gradients[step][name], gradient, largest)


def largest_of(values: Named) -> float:
    return max(value.abs().max().item() for value in values.values())


def scale_of(want: Tensor, largest: float) -> float:
    """What an error of ``want`` is measured against: its largest element, at least ``SMALL`` of its step's largest."""
    return max(want.abs().max().item(), SMALL * largest)


def unseen(reference: Trajectory, bound: float) -> list[str]:
    """Parameters whose gradient could be zeros in every step, and the error would be within the bound."""
    worst = {name: Worst() for name in reference.gradients[0]}
    for gradients in reference.gradients:
        largest = largest_of(gradients)
        for name, gradient in gradients.items():
            worst[name].note("gradient", name, torch.zeros_like(gradient), gradient, largest)
    return [name for name, one in worst.items() if one.error["gradient"] <= bound]


def worst_of(case: Case, runs: list[RankRun]) -> tuple[Worst, Trajectory]:
    """The plan's run against the reference; and the reference's, which followed the first replica."""
    replicas = [
        whole(case, [run for run in runs if run.coordinates["dp_replicate"] == replica])
        for replica in range(case.plan.dp_replicate)
    ]
    reference = run_reference(case, replicas[0])
    worst = Worst()
    for run in runs:
        for step, (loss, norm) in enumerate(zip(run.losses, run.norms, strict=True)):
            worst.note("loss", f"step {step}", loss, reference.losses[step])
            worst.note("gradient", f"global norm, step {step}", norm, reference.norms[step])
    for ran in replicas:
        for name, value in starting_weights(case).items():
            worst.note("weight", f"{name}, at the start", ran.weights[0][name], value)
        worst.note_gradients(ran, reference)
        for step in range(case.steps):
            largest = largest_of(reference.updates[step])
            for name, update in reference.updates[step].items():
                worst.note("weight", f"{name}, step {step}", ran.updates[step][name], update, largest)
    return worst, reference


def rounding(case: Case) -> float:
    """Of the loss and the gradients of a step in float32, relative: see :func:`bounds_of`."""
    longest = max(case.config.tokens(case.latent) * case.samples * case.plan.data_ranks, case.config.ffn)
    depth = 60 * case.config.layers
    return UNIT_ROUNDOFF["float32"] * (8 * math.sqrt(longest * depth) + 2000)


def bounds_of(case: Case, reference: Trajectory) -> dict[str, float]:
    """What rounding alone may do in one step: see [Note: step by step] in ``parity.py``.

    float32. A sum of n rounded terms errs by about u sqrt(n), u the unit roundoff, relative to its largest terms; the
    records between a number and the loss add up in quadrature. Hence u sqrt(n depth), with the longest sum (over tokens
    and samples, or over the FFN) and the records of one forward and backward pass, times 8 for sums that cancel. One
    number is worse by its nature: the angle 1000 t of the time features, rounded twice, errs by up to 2000 u. Where
    logits are large, an exponential errs by as many u: then twice what plain autograd errs in float32, if that is more.

    Weights (float32 and bf16: master weights are float32). AdamW rounds the weight three times, and what it subtracts,
    lr times a number near 1, some ten times: 8 u (max|w| / max|update|), the worst of all tensors.

    bf16. Twice the error that one rank makes. A loss is one number and may be right by chance there: it is |r|^2 / N,
    r the error of the velocity, so it errs at most twice as much as r does (Cauchy and Schwarz), and the first
    gradient, r times what the head read, errs like r. Hence twice the largest error of that gradient on one rank.
    """
    if case.plan.dtype == "float64":
        return dict.fromkeys(QUANTITIES, FLOAT64_BOUND)
    u, noise = UNIT_ROUNDOFF["float32"], rounding(case)
    magnified = max(
        before[name].abs().max().item() / scale_of(update, largest)
        for before, updates in zip(reference.weights, reference.updates, strict=True)
        for largest in (largest_of(updates),)
        for name, update in updates.items()
    )
    bounds = {"loss": noise, "gradient": noise, "weight": 8 * u * magnified}
    if case.plan.dtype == "float32":
        plain = Worst()
        plain.note_gradients(run_reference(case, reference, torch.float32), reference)
        bounds["gradient"] = max(noise, 2 * plain.error["gradient"])
    else:
        alone = case.on_one_rank()
        run = run_rank(alone, watched=False)
        by_itself, wanted = worst_of(alone, [run])
        first = Worst()
        if case.config.lora is not None:  # the head is frozen: the same model with all weights trained
            alone = replace(alone, config=case.config.base)
            run = run_rank(alone, watched=False)
            _, wanted = worst_of(alone, [run])
        for got, want in zip(whole(alone, [run]).gradients, wanted.gradients, strict=True):
            first.note("gradient", FIRST_GRADIENT, got[FIRST_GRADIENT], want[FIRST_GRADIENT])
        bounds["gradient"] = 2 * by_itself.error["gradient"]
        bounds["loss"] = 2 * first.error["gradient"]
    return bounds
