"""A sample's place in the step's batch, as training gives it: the same under every split of the batch, and drawn by.

The recipe has six windows and batches of eight, so every step holds some window twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from torch import Tensor
from training import recipe

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training import feed
from cinemesh.launch.training import loop as train
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.model.config import preset
from cinemesh.model.inputs import IDS, PLACES, BatchShape
from cinemesh.model.runner import Batch, StepRunner
from cinemesh.model.step import Optimizer, build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh

pytestmark = pytest.mark.usefixtures("one_process")

SAMPLES, STEPS = 8, 2
SPLITS: list[dict[str, int]] = [
    {"dp_shard": 2, "dp_replicate": 2, "micro_batches": 2},
    {"tp": 2, "micro_batches": 4},
]
Loaded = list[tuple[int, int]]  # (place, sample id) of what a rank took, in its order


def values_of(clips: Path, out: Path, plan: dict[str, int]) -> dict[str, Any]:
    values = recipe(clips, out, dtype="float64", **plan)
    values["data"]["global_batch"] = SAMPLES
    values["schedule"] = {"steps": STEPS}
    values["logging"] |= {"every": 1, "validate_every": 0}
    return values


def places_of_the_share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fault: an index in what this rank took of this micro-batch."""
    return batch | {PLACES: torch.arange(len(batch[PLACES]))}


def no_places(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {PLACES: torch.zeros_like(batch[PLACES])}


Fault = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def run_rank(values: dict[str, Any], fault: Fault | None = None) -> Loaded:
    """One rank of a run in the pool, or alone."""
    setting = Setting.of(check_config(values, "test"))
    mesh = Mesh(setting.config.plan) if setting.config.plan.world_size > 1 else None
    place = Joined(mesh.rank if mesh else 0, "cpu", mesh)
    loaded: Loaded = []
    collate, load = feed.collate, StepRunner.load

    def faulty(*given: Any) -> dict[str, Tensor]:
        return fault(collate(*given)) if fault else collate(*given)

    def noted(self: StepRunner, micro_batch: int, batch: Batch) -> None:
        loaded.extend(zip(batch[PLACES].tolist(), batch[IDS].tolist(), strict=True))
        load(self, micro_batch, batch)

    feed.collate, StepRunner.load = faulty, noted
    try:
        train.train_steps(setting, place, open_history(setting, place), StopSignal())
    finally:
        feed.collate, StepRunner.load = collate, load
        if mesh:
            mesh.close()
    return loaded


def losses(values: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(values["logging"]["directory"]))]


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, list[float]]:
    """One process, one micro-batch."""
    values = values_of(clips, tmp_path_factory.mktemp("whole"), {})
    return run_rank(values), losses(values)


@pytest.mark.parametrize("plan", SPLITS, ids=str)
def test_places_and_draws_are_those_of_the_whole_batch(
    pool: Pool, clips: Path, tmp_path: Path, plan: dict[str, int], whole: tuple[Loaded, list[float]]
) -> None:
    """Each of the step's places once, with the sample that one process has there; and the same losses."""
    values = values_of(clips, tmp_path, plan)
    ranks = pool.run(Plan.from_dict(plan).world_size, run_rank, values)
    per_step = SAMPLES // (plan.get("dp_shard", 1) * plan.get("dp_replicate", 1))
    for step in range(STEPS):
        wanted = whole[0][step * SAMPLES : (step + 1) * SAMPLES]
        assert [place for place, _ in wanted] == list(range(SAMPLES))
        assert len({sample for _, sample in wanted}) < SAMPLES  # some window is there twice
        taken = [part for loaded in ranks for part in loaded[step * per_step : (step + 1) * per_step]]
        assert sorted(set(taken)) == wanted
        assert len(taken) == SAMPLES * plan.get("tp", 1)
    assert losses(values) == pytest.approx(whole[1], rel=1e-11)


@pytest.mark.parametrize("fault", [places_of_the_share, no_places])
def test_other_places_are_other_losses(
    pool: Pool, clips: Path, tmp_path: Path, fault: Fault, whole: tuple[Loaded, list[float]]
) -> None:
    """Guards the comparison: it must see a place that is counted in a rank's own share, and one that is ignored."""
    values = values_of(clips, tmp_path, SPLITS[0])
    values["schedule"] = {"steps": 1}
    pool.run(4, run_rank, values, fault)
    assert abs(losses(values)[0] - whole[1][0]) > 1e-3 * whole[1][0]


def test_places_outside_of_the_batch_are_refused() -> None:
    config, batch = preset("tiny"), BatchShape(2, (3, 4, 12))
    runner = StepRunner(config, Plan(micro_batches=2), batch, Optimizer(), None)
    inputs = {given.name: runner.executor.buffers[given.buffer].clone() for given in runner.program.inputs}
    for wrong in ([2, 4], [-1, 0]):
        with pytest.raises(CinemeshError, match=rf"places \[{wrong[0]}, {wrong[1]}\] in a step's global batch of 4"):
            runner.load(1, inputs | {PLACES: torch.tensor(wrong)})
    right = inputs | {PLACES: torch.tensor([2, 3])}
    runner.load(1, right)
    for ids in ([0, 1 << 32], [-1, 0]):  # 32 bits of the counter: sample 2**32 would draw as sample 0
        with pytest.raises(CinemeshError, match=rf"sample ids \[{ids[0]}, {ids[1]}\], .* from 0 to 4294967295"):
            runner.load(1, right | {IDS: torch.tensor(ids)})
    runner.load(1, right | {IDS: torch.tensor([0, (1 << 32) - 1])})


def test_more_places_than_a_counter_holds_are_refused() -> None:
    plan = Plan(dp_shard=1 << 12, micro_batches=1 << 11)
    with pytest.raises(CinemeshError, match=r"samples\(3\) \* data ranks\(4096\) .* = 25165824 > 16777216"):
        build_step(preset("tiny"), plan, BatchShape(3, (3, 4, 12)))
