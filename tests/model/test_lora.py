"""Low-rank factors beside frozen weights: what their step computes, and what it does not hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Pool
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.bounds import FLOAT64_BOUND
from cinemesh.launch.proof.lint import lint
from cinemesh.launch.proof.parity import OPTIMIZER, Case, global_batch
from cinemesh.launch.proof.verify import Report, small_case, verify_on_rank
from cinemesh.model.config import ModelConfig, parameters, preset, trained
from cinemesh.model.lora import LORA_TARGETS, Lora, factors_of
from cinemesh.model.runner import StepRunner
from cinemesh.model.sampler import Sampler
from cinemesh.model.step import build_step, unit_layout
from cinemesh.model.weights import BLOCK, fill_shard, full, probe_values
from cinemesh.parallel.ir.layout import PlacementError
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program
from cinemesh.parallel.ir.records import Holds
from cinemesh.parallel.ir.units import Parameter
from cinemesh.parallel.layers.factors import Factors
from cinemesh.parallel.runtime.mesh import coordinates
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.footprint import footprint
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.search.extrapolate import Extrapolation
from cinemesh.perf_model.search.few_blocks import FewBlocks

ALL = Lora(4, 6.0)
PLANS = (
    "tp=1",
    "tp=2,cp=2,dp_shard=2",
    "tp=2,cp=2,kv_slices=3,tp_slices=3,recompute=full",
    "cp=2,dp_shard=2,kv_chunks=3,grad_units=2,micro_batches=2,prefetch=2",
    "tp=2,dp_replicate=2,fused_tp=true,defer_weight_gradients=true",
)


def case_of(text: str, lora: Lora = ALL) -> Case:
    case = small_case(Plan.parse(text, dtype="float64"))
    return replace(case, config=replace(case.config, lora=lora))


def reported(case: Case) -> Report | None:
    return verify_on_rank(case)


@pytest.mark.parametrize("text", PLANS)
def test_under_a_plan_its_step_is_the_reference(pool: Pool, text: str) -> None:
    """Which multiplies merged weights: so what the factors add is what merging adds."""
    case = case_of(text)
    report = pool.run(case.plan.world_size, reported, case)[0]
    assert report is not None and report.ok, report
    assert max(report.worst.values()) <= FLOAT64_BOUND


@pytest.mark.parametrize("targets", [("q",), ("cross.kv", "down"), ("o", "gate")])
def test_any_products_may_have_factors(pool: Pool, targets: tuple[str, ...]) -> None:
    case = case_of("tp=2,dp_shard=2", Lora(2, 1.0, targets))
    report = pool.run(4, reported, case)[0]
    assert report is not None and report.ok, report
    assert len(trained(case.config)) == 2 * len(targets) * case.config.layers


# -- what is frozen ---------------------------------------------------------------------------------------------------


def held_by(program: Program, *kinds: Holds) -> list[str]:
    return [name for name, buffer in program.buffers.items() if buffer.base is None and buffer.holds in kinds]


def test_what_is_frozen_has_no_gradient_moments_average_or_record() -> None:
    case = case_of("tp=2,cp=2,dp_shard=2")
    program, units = build_step(case.config, case.plan, case.batch), unit_layout(case.config, case.plan)
    mine = {row.name for row in trained(case.config)}
    assert {slot.parameter.name for unit in units.units for slot in unit.slots} == mine
    assert {slot.parameter.name for unit in units.frozen for slot in unit.slots} == {
        row.name for row in parameters(case.config.base)
    }
    states = held_by(program, Holds.MASTER, Holds.MOMENT, Holds.EMA, Holds.GRADIENT)
    assert {program.local_elements(name) for name in states} == {units.flat_elements}
    (frozen,) = held_by(program, Holds.FROZEN)
    assert program.local_elements(frozen) == units.frozen_elements
    # Gradients are written into the flat gradients of trained units alone, and each of them once.
    flats = set(held_by(program, Holds.UNIT_GRADIENT))
    written = [program.buffers[n].role for op in program.ops for n in op.outputs if program.root(n)[0] in flats]
    assert len(flats) == case.config.layers + 1
    assert sorted(role for role in written if role.startswith("d.")) == sorted(
        f"d.{row.in_block}" for row in trained(case.config)
    )


def test_no_record_makes_the_gradient_of_what_all_blocks_share() -> None:
    program = build_step(case_of("tp=1").config, Plan(dtype="float64"), case_of("tp=1").batch)
    kinds = {op.kind for op in program.ops}
    assert not kinds & {"position_backward", "layer_norm_backward", "silu_backward", "sum_to"}
    assert kinds >= {"modulate_norm_backward", "attention_backward", "scale"}


def test_frozen_weights_are_held_once_in_the_compute_dtype() -> None:
    """Of the 30B in bf16 two bytes a weight, where training it takes eighteen and gradients."""
    config, plan = preset("movie-gen-30b"), Plan.parse("tp=2,cp=4,dp_shard=8,recompute=full")
    config = replace(config, layers=2)
    case = small_case(Plan())
    batch = replace(case.batch, latent=(32, 96, 96), samples=1)
    cluster = load("grand-teton-h100")
    found = footprint(build_step(replace(config, lora=Lora(16, 16.0)), plan, batch), cluster).by_class
    units = unit_layout(replace(config, lora=Lora(16, 16.0)), plan)
    assert found["frozen weights"] == 2 * units.frozen_elements
    assert found["optimizer"] == 12 * units.flat_elements < found["frozen weights"] / 8
    assert sum(unit.elements for unit in units.frozen) >= sum(row.elements for row in parameters(config)) / 2


def test_a_deep_models_memory_follows_from_few_blocks() -> None:
    """As that of its own program: factors that tp does not split grow with every block, and lie in one unit."""
    config = replace(preset("tiny"), layers=24, lora=ALL)
    models = PriceModels.of(load("grand-teton-h100"))
    batch = replace(small_case(Plan()).batch, samples=2)
    for text in ("tp=2,cp=2,dp_shard=2", "dp_shard=8,recompute=full", "tp=2,dp_shard=6,dp_replicate=2"):
        plan = Plan.parse(text)
        step = Extrapolation(FewBlocks.build(config, plan, batch), plan, models)
        assert step.few.more > 0
        deep = FewBlocks(config, batch, plan, 24, build_step(config, plan, batch), unit_layout(config, plan), True)
        assert step.peak_bytes(plan) == pytest.approx(Extrapolation(deep, plan, models).peak_bytes(plan), rel=2e-3)


def test_it_is_linted_whole(tmp_path: Path) -> None:
    model = tmp_path / "factors.yaml"
    model.write_text("preset: tiny\nlora: {rank: 4, alpha: 8}\n")
    assert lint(Plan.parse("tp=2,cp=2"), str(model)) == []


# -- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["ddown", "dup"])
def test_a_factors_gradient_that_is_not_made_is_refused(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    backward = Factors.backward

    def without(self: Factors, dy: Any, x: Any, ddown: Any, dup: Any, add_to: Any = None) -> Any:
        spare = {"ddown": ddown, "dup": dup}[forgotten]
        spare = self.b.buffer(f"{self.name}_{forgotten}_elsewhere", spare.shape, spare.dtype, spare.placement)
        self.b.discard(spare)
        given = {"ddown": ddown, "dup": dup} | {forgotten: spare}
        return backward(self, dy, x, given["ddown"], given["dup"], add_to)

    monkeypatch.setattr(Factors, "backward", without)
    case = case_of("tp=2")
    with pytest.raises(PlacementError, match=r"is not the whole gradient of .*lora_"):
        build_step(case.config, case.plan, case.batch)


def test_a_wrong_scale_is_seen(pool: Pool) -> None:
    case = case_of("tp=1")
    other = case_of("tp=1", Lora(4, 6.0 + 1e-6))
    report = pool.run(1, mixed, case, other)[0]
    assert report is not None and not report.ok


def mixed(case: Case, other: Case) -> Report | None:
    """The plan runs one scale, the reference the other."""
    return verify_on_rank(
        case, lambda mesh: StepRunner(other.config, other.plan, other.batch, OPTIMIZER, mesh, seed=case.seed)
    )


# -- merged -----------------------------------------------------------------------------------------------------------


def sampled(config: ModelConfig, case: Case, weights: dict[str, Tensor]) -> Tensor:
    """Latents after two steps."""
    units, at = unit_layout(config, case.plan), coordinates(case.plan, 0)

    def given(row: Parameter, block: Tensor) -> Tensor:
        flat = F.pad(weights[row.name].view(-1), (0, BLOCK))
        return flat[(block[..., None] * BLOCK + torch.arange(BLOCK)).clamp(max=len(flat) - 1)]

    master = torch.empty(1, units.flat_elements, dtype=torch.float64)
    fill_shard(master, units, at, given)
    frozen = None
    if units.frozen:
        frozen = torch.empty(1, units.frozen_elements, dtype=torch.float64)
        fill_shard(frozen, units.of_frozen, at, given)
    sampler = Sampler(config, case.plan, case.batch, None, master, guidance=1.0, frozen=frozen)
    return sampler.sample(global_batch(case, 0, 0), 5, torch.arange(case.samples), [0.0, 0.4, 1.0])


def test_merged_weights_give_what_factors_give() -> None:
    """By the program, and by the reference; the sampler's steps too."""
    case = case_of("tp=1")
    config = case.config
    assert config.lora is not None
    adapted = full(parameters(config), probe_values(case.seed), torch.float64)
    weights = {name: value.clone() for name, value in adapted.items()}
    for layer in range(config.layers):
        for name in LORA_TARGETS:
            down, up = (weights[f"blocks.{layer}.{factor}"] for factor in factors_of(name))
            weights[f"blocks.{layer}.{name}"] += config.lora.scale * torch.tensordot(down, up, 1)
    wanted = sampled(config.base, case, weights)
    assert (sampled(config, case, adapted) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert (sampled(config.base, case, adapted) - wanted).abs().max() > 1e-2  # what they add is no rounding


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"targets": ()}, r"targets are \[\]"),
        ({"targets": ("q", "q")}, "each once"),
        ({"targets": ("cross.p",)}, "did you mean 'cross.o'|did you mean 'cross.q'|did you mean 'up'"),
    ],
)
def test_factors_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        Lora(**{"rank": 4, "alpha": 4.0} | given)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(CinemeshError, match=r"lora.rank\(49\) > width\(48\)"):
        replace(preset("tiny"), lora=Lora(49, 1.0))
