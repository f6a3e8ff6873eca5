"""Replicas that differ are found before a checkpoint is written, and the rank that differs is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from training import recipe

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster.processes import Joined, StopSignal
from cinemesh.launch.training import loop, replicas
from cinemesh.launch.training.latent_cache import open_history
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.replicas import BITS, ReplicaSums, bit_sum, odd_ones
from cinemesh.launch.training.setting import Setting
from cinemesh.model.buckets import BucketRunner
from cinemesh.parallel.runtime.mesh import Mesh


def held(rank: int, shard: int = 0, ema: int = 7) -> ReplicaSums:
    return ReplicaSums((shard, 0, 0), (1, 2, 3, ema), f"rank {rank}")


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([held(0), held(1), held(2)], None),
        ([held(0), held(1, shard=1, ema=9)], None),
        ([held(0), held(1, ema=9), held(2)], "rank 1 in ema"),
        ([held(0, ema=9), held(1), held(2)], "rank 0 in ema"),
        ([held(0), held(1, ema=9)], "rank 0 or rank 1 in ema"),
        ([held(0), held(1, ema=9), held(2, ema=8)], "rank 0 or rank 1 or rank 2 in ema"),
        ([held(0), held(1), held(2, ema=9), held(3), held(4, shard=1), held(5, shard=1)], "rank 2 in ema"),
        ([held(0), held(1, ema=9), held(2, ema=9), held(3), held(4)], "rank 1 and rank 2 in ema"),
    ],
)
def test_who_differs_from_most_replicas_of_its_shard_is_named(ranks: list[ReplicaSums], found: str | None) -> None:
    """Two that differ from each other are both named: none can say which of them is right."""
    assert odd_ones(ranks) == found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_flipped_bit_changes_the_sum(dtype: torch.dtype) -> None:
    """Of a zero's sign and a NaN's payload too, which no comparison of numbers sees."""
    values = torch.tensor([0.0, 1.5, -3.0, float("nan")], dtype=dtype)
    bits = values.view(BITS[values.element_size()])
    before = bit_sum(values)
    for place in range(len(bits)):
        for bit in range(8 * values.element_size()):
            flip = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(bits.dtype)
            bits[place] ^= flip
            assert bit_sum(values) != before, (place, bit)
            bits[place] ^= flip
    assert bit_sum(values) == before


def test_a_sum_of_bits_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's sum in int64 copies what it sums into that: of a shard at once, twice its bytes that no plan has."""
    monkeypatch.setattr(replicas, "PART_ELEMENTS", part := 1 << 12)
    values = torch.randn(1, 10 * part + 7, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        found = bit_sum(values)
    assert found == values.view(torch.int32).long().sum().item()
    taken = [event.self_cpu_memory_usage for event in seen.events() or ()]
    assert 8 * part <= max(taken) < 9 * part


def trained(values: dict[str, Any], flipped: int | None) -> str:
    """What a rank of a run hears in which a bit of one rank's EMA flips in step 3."""
    step, rank = BucketRunner.step, dist.get_rank()

    def flips(self: BucketRunner, *given: Any, **how: Any) -> None:
        step(self, *given, **how)
        if self.first.steps_done == 3 and rank == flipped:
            self.buffers["ema"].view(torch.int32)[0, 5] ^= 1 << 20

    mesh = Mesh(check_config(values, "test").plan)
    setattr(BucketRunner, "step", flips)  # noqa: B010  a type checker minds otherwise
    try:
        setting, place = Setting.of(check_config(values, "test")), Joined(rank, "cpu", mesh)
        loop.train_steps(setting, place, open_history(setting, place), StopSignal())
    except CinemeshError as error:
        return str(error)
    finally:
        setattr(BucketRunner, "step", step)  # noqa: B010
        mesh.close()
    return ""


@pytest.mark.parametrize("flipped", [None, 2])
def test_a_run_whose_replicas_differ_ends_before_it_saves_them(
    flipped: int | None, pool: Pool, clips: Path, tmp_path: Path
) -> None:
    """Three replicas: nothing else of a step reads another rank's EMA, so it would be saved, and sampled from."""
    values = recipe(clips, tmp_path, dp_replicate=3)
    values["data"]["global_batch"] = 3
    values["logging"] |= {"checkpoint_every": 2, "validate_every": 0}
    heard = pool.run(3, trained, values, flipped)
    assert len(set(heard)) == 1
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]
    if flipped is None:
        assert heard[0] == "" and steps == ["step-00000004", "step-00000006"]
        return
    assert "step 4: replicas of a shard differ, which were the same in step 2: rank 2 (cpu of " in heard[0]
    assert ") in ema; take that device out of the job, and go on from a checkpoint of step 2 or before" in heard[0]
    assert steps == ["step-00000002"]
