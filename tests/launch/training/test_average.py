"""What is left of the random start in the average of the weights, and that it is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training import start

from cinemesh.kernels.reference import REFERENCE
from cinemesh.launch.training.average import start_weight
from cinemesh.model.step import Optimizer

pytestmark = pytest.mark.usefixtures("one_process")


def left_of_the_start(decay: float, updates: int) -> float:
    """Of an average that starts at 1 while the weights stay 0, by the op itself."""
    zero, ema, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), torch.tensor(1.0)
    attrs = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "ema_decay": decay}
    attrs |= {"last_offset": 0, "last_elements": 1, "last_decayed": 1, "rank": 0}
    states = [zero, zero.clone(), zero.clone(), ema]
    for update in range(1, updates + 1):
        given = [zero.clone(), one, torch.tensor(True), torch.tensor([update, update]), one]
        REFERENCE["adamw"]([*states, *given], states, **attrs)
    return ema.item()


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.5, 0.9, Optimizer.ema_decay])
@pytest.mark.parametrize("updates", [0, 1, 2, 8, 9, 60])
def test_the_start_weighs_what_the_op_leaves_of_it(decay: float, updates: int) -> None:
    """And both what the rule says: the product of min(decay, (1 + n) / (10 + n))."""
    product = math.prod(min(decay, (1 + n) / (10 + n)) for n in range(1, updates + 1))
    assert left_of_the_start(decay, updates) == pytest.approx(product, rel=1e-12, abs=1e-300)
    assert start_weight(decay, updates) == pytest.approx(product, rel=1e-9, abs=1e-300)


def test_a_short_run_is_not_its_start() -> None:
    """By the default decay: 94 % of the start was left after 60 updates, when the decay did not warm up."""
    assert start_weight(Optimizer.ema_decay, 60) < 1e-9
    assert start_weight(Optimizer.ema_decay, 3) == pytest.approx(2 / 11 * 3 / 12 * 4 / 13)
    # Warm up to n = 8990, where (1 + n) / (10 + n) is 0.999: longer runs average as they did.
    ratio = start_weight(Optimizer.ema_decay, 20_001) / start_weight(Optimizer.ema_decay, 20_000)
    assert ratio == pytest.approx(Optimizer.ema_decay)


@pytest.mark.parametrize(("weights", "told"), [("ema", 1), ("master", 0)])
def test_it_is_told_while_it_weighs(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str, told: int
) -> None:
    """Validated after 3 and 6 updates: 1.4 % of the start are left after three, nothing to speak of after six."""
    values["optimizer"] = {"lr": 1e-2}
    assert start(values | {"weights": weights}, tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("the random start still weighs") == told
    assert out.count("after 3 updates the random start still weighs 1.4%") == told
