"""The classes of the memory picture hold what their names say, by closed forms: the total is right with any classes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step, unit_layout
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import BufferKind
from cinemesh.parallel.passes.device_memory import Workspaces
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.footprint import stack
from cinemesh.perf_model.prices.played import play_step


@pytest.mark.parametrize("text", ["tp=2,dp_shard=2", "dp_shard=4,prefetch=2,grad_units=2", "cp=2,micro_batches=2"])
def test_states_and_units_stand_in_their_classes(text: str) -> None:
    """bf16: fp32 master weights, two moments, average and gradients; bf16 weights, gathered and as gradients too."""
    plan, config = Plan.parse(text), preset("tiny")
    program = prepare(build_step(config, plan, BatchShape(1, (3, 4, 12))), backend="nccl")
    units = unit_layout(config, plan)
    classes, flat = stack(program, Workspaces("sm_90")).by_class, units.flat_elements
    assert set(classes["optimizer"]) == {3 * 4 * flat} and set(classes["EMA"]) == {4 * flat}
    assert max(classes["weights"]) == 2 * flat and max(classes["gradients"]) == 4 * flat
    given = [buffer for buffer in program.buffers.values() if buffer.kind is BufferKind.INPUT and buffer.base is None]
    counters_loss_and_norm = 2 * 8 + 4 + 4
    inputs = sum(program.bytes(buffer.name) for buffer in given) + counters_loss_and_norm
    assert set(classes["inputs"]) == {inputs}
    largest = 2 * max(unit.elements for unit in units.units)
    for name in ("gathered units", "unit gradients"):
        assert min(classes[name]) == 0 and max(classes[name]) >= largest
    assert classes["kept activations"][-1] == 0 < max(classes["kept activations"])


def test_host_memory_is_counted_apart_and_refused_where_it_is_too_small() -> None:
    """Of the whole step: 7 of 8 blocks send one storage each; a byte less than they need does not do."""
    config, batch, cluster = (
        replace(preset("movie-gen-30b"), layers=8),
        BatchShape(1, (4, 32, 32)),
        load("grand-teton-h100"),
    )
    plan = Plan.parse("tp=2,cp=2,recompute=selective,offload=gate")
    kept, away = (play_step(config, p, batch, cluster).footprint for p in (replace(plan, offload=()), plan))
    needed = (
        7 * 4 * 32 * 32 // 4 // 2 * config.ffn // 2 * 2
    )  # tokens of a rank's cp share, columns of its tp share, bf16
    assert (kept.host_bytes, away.host_bytes) == (0, needed)
    assert away.by_class["kept activations"] < kept.by_class["kept activations"]
    play_step(config, plan, batch, cluster.with_(**{"host.memory_bytes": float(needed)}))
    with pytest.raises(CinemeshError, match="GB a GPU into host memory"):
        play_step(config, plan, batch, cluster.with_(**{"host.memory_bytes": float(needed - 1)}))
