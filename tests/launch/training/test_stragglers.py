"""A rank that computes longer than the others is named, beside what was predicted; where all are alike, nobody is."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from harness import Pool
from training import recipe

from cinemesh.kernels.reference import Kernel
from cinemesh.launch.cluster.cards import CardFacts
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training.card_watch import CardWatch
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.loop import train_steps
from cinemesh.launch.training.recipe import read_config
from cinemesh.launch.training.setting import Setting
from cinemesh.launch.training.stragglers import FEWEST_STEPS, SLOWER, Straggler, Stragglers
from cinemesh.launch.training.telemetry import read_metrics
from cinemesh.parallel.runtime.mesh import Mesh

RANKS, SLOW = 4, 2


def of_steps(seconds: list[list[float]], stragglers: Stragglers | None = None) -> Stragglers:
    found = stragglers or Stragglers()
    for step in seconds:
        found.add([round(each * 1e6) for each in step])
    return found


def test_a_slow_rank_is_named_whatever_the_steps_are_like() -> None:
    """Steps of two lengths, every rank 5 % noise, one rank 1.6 times as long: against the median rank of each step."""
    draw = random.Random(3)
    steps = [[base * draw.uniform(0.95, 1.05) * (1.6 if rank == 7 else 1.0) for rank in range(32)] for base in
             [0.2, 1.0, 1.0, 0.2, 1.0, 0.2, 0.2, 1.0]]  # fmt: skip
    (found,) = of_steps(steps).interval()
    assert found.rank == 7 and found.times == pytest.approx(1.6, rel=0.06)


def test_nobody_is_named_where_all_are_alike_or_one_step_alone_was_late() -> None:
    draw = random.Random(5)
    for _ in range(50):
        steps = [[draw.uniform(0.95, 1.05) for _ in range(64)] for _ in range(9)]
        steps[draw.randrange(9)][draw.randrange(64)] *= 20
        steps[draw.randrange(9)] = [each * 3 for each in steps[0]]
        assert of_steps(steps).interval() == []
    slow = [[1.0, 1.0, 2.0]] * (FEWEST_STEPS - 1)
    assert of_steps(slow).interval() == [] and of_steps([*slow, slow[0]]).interval() == [Straggler(2, 2.0, 2.0)]
    assert of_steps([[0.0, 1.0, 2.0]] * 9).interval() == [], "a rank that does not know, as on a GPU"
    assert of_steps([[3.0]] * 9).interval() == [] and SLOWER > 1


def test_news_are_told_once_with_what_was_predicted_and_what_the_gpu_says() -> None:
    cards = CardWatch(0, 4, 2, None)
    slow = CardFacts(
        index=1, name="x", memory_bytes=1, used_bytes=1, clock_mhz=1200, power_w=650.0, slowed=("power brake",)
    )
    cards.read = lambda: {"a": [slow, slow], "b": [slow, slow]}
    stragglers = Stragglers(None, cards)
    found = [Straggler(3, 1.5, 0.75)]
    told = "WARNING: rank 3 computes 1.50 times as long as the median rank, 0.75 s a step, predicted 0.5 s"
    assert stragglers.news(found, 0.5) == f"{told}, GPU 1: 1200 MHz, 650 W, power brake"
    assert stragglers.news([Straggler(3, 1.6, 0.8)], 0.5) is None
    assert stragglers.news([], 0.5) == "no rank computes longer than the others any more"
    many = stragglers.news([Straggler(rank, 2.0, 1.0) for rank in range(9)], None)
    assert many is not None and many.endswith("; and 5 more") and "predicted" not in many


def train_slowly(path: Path) -> None:
    """One of four ranks, of which one sleeps in an op that computes."""
    setting = Setting.of(read_config(path))
    kernels = Setting.kernels

    def slowed(self: Setting, device: str) -> Any:
        found = kernels(self, device)
        if dist.get_rank() == SLOW:
            found["swiglu"] = _late(found["swiglu"])
        return found

    Setting.kernels = slowed  # type: ignore[method-assign]
    mesh = Mesh(setting.config.plan)
    place = Joined(mesh.rank, "cpu", mesh)
    try:
        train_steps(setting, place, open_history(setting, place), StopSignal())
    finally:
        Setting.kernels = kernels  # type: ignore[method-assign]
    mesh.close()


def _late(kernel: Kernel) -> Kernel:
    def late(*given: Any, **attrs: Any) -> None:
        time.sleep(0.05)
        kernel(*given, **attrs)

    return late


@pytest.mark.usefixtures("one_process")
def test_a_rank_that_sleeps_in_an_op_is_named_by_the_run(clips: Path, tmp_path: Path, pool: Pool) -> None:
    """All ranks' steps take as long: by its waits, which it has not, one is told from the others."""
    values: dict[str, Any] = recipe(clips, tmp_path, tp=2, dp_shard=2)
    values["capture"] = "off"
    values["schedule"]["steps"] = 14
    values["logging"] |= {"every": 14, "validate_every": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    pool.run(RANKS, train_slowly, tmp_path / "recipe.yaml")
    (row,) = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert row["slowest_rank"] == SLOW and row["slowest_over_median"] > 2
    log = (tmp_path / "run" / "train.log").read_text()
    (told,) = [line for line in log.splitlines() if "times as long as the median rank" in line]
    assert f"step 14: WARNING: rank {SLOW} computes " in told and told.count("computes") == 1
