"""A training, step after step, beside torch's own."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from benchmarks.training_curves import RANKS, RECIPE, drift, follow
from harness import Pool, forget_meshes

from cinemesh.launch.training.recipe import read_config

STEPS = 24
CALM = 18  # steps: the batch of the next one multiplies any rounding, torch's own by 13
BOUND = 1e-6  # of a loss in these


def losses(cache: str) -> dict[str, list[float]]:
    """Runs in a worker."""
    forget_meshes()
    return follow(read_config(RECIPE, [f"data.cache={cache}"]), STEPS)


@pytest.mark.slow
def test_tp_and_cp_follow_torchs_fsdp2(pool: Pool, tmp_path: Path) -> None:
    """Only here are many steps in a row compared with an optimizer, a clipping and a sharding that are not ours."""
    found = pool.run(RANKS, losses, str(tmp_path))[0]
    assert fmean(found["fsdp2"][-8:]) < fmean(found["fsdp2"][:8])  # what learns nothing is easily followed
    ours, rounded = (drift(found[side], found["fsdp2"]) for side in ("cinemesh", "rounded"))
    assert 0.0 < ours[CALM - 1] < BOUND
    assert ours[-1] < rounded[-1], "no further than torch from itself, begun with weights one rounding away"
