"""The running average of the weights (EMA), which is validated and sampled: how much of the random start is in it.

Its decay warms up, min(decay, (1 + n) / (10 + n)) at update n (see ``kernels/reference.py``): after four updates the
start weighs 0.5 %.
"""

from __future__ import annotations

import math

from .recipe import Config

TOLD_ABOVE = 0.01  # of the average


def start_weight(decay: float, updates: int) -> float:
    """The share of the random start in the average after so many updates."""
    # (1 + n) / (10 + n) is below the decay as long as n is below this.
    rising = math.ceil((10 * decay - 1) / (1 - decay))
    warm = min(max(rising - 1, 0), updates)
    # The product over 1 .. warm is (warm + 1)! 10! / (warm + 10)!.
    start = math.exp(math.lgamma(warm + 2) + math.lgamma(11) - math.lgamma(warm + 11))
    return start * decay ** (updates - warm)


def remark(config: Config, updates: int) -> str | None:
    """What is to be said of the weights that are shown, if anything."""
    start = start_weight(config.optimizer.ema_decay, updates)
    if config.weights != "ema" or config.start_from is not None or start <= TOLD_ABOVE:
        return None
    return (
        f"after {updates} updates the random start still weighs {start:.1%} in the average of the weights (EMA), which "
        "is what is shown here: train longer, lower optimizer.ema_decay, or take weights: master"
    )
