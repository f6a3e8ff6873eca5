"""When the held-out loss stands still: how often the learning rate was cut, of the validations so far (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence

VALIDATIONS = "validations"  # of a checkpoint's note: every validation so far, so that a resume counts as its run did

Validated = tuple[int, float, float]
"""(step, held-out loss, its standard error)."""


def plateaus(validations: Sequence[Validated], patience: int) -> int:
    """How many plateaus there were.

    A validation is better when its loss is lower than the best one's by more than its own standard error. After
    ``patience`` in a row that are not, the loss stood still, and the count begins anew.
    """
    best, behind, found = float("inf"), 0, 0
    for _, loss, error in validations:
        if loss < best - error:
            best, behind = loss, 0
            continue
        behind += 1
        if behind == patience:
            found, behind = found + 1, 0
    return found
