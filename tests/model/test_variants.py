"""What a variant adds is a field that reference, builder, table and small case read: shown on the spatial upsampler."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness import Pool
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.proof.bounds import FLOAT64_BOUND
from cinemesh.launch.proof.lint import lint
from cinemesh.launch.proof.parity import OPTIMIZER, Case, global_batch, load_batch
from cinemesh.launch.proof.verify import Report, small_case, verify_on_rank
from cinemesh.model import flow
from cinemesh.model.config import PRESETS, USUAL_LATENTS, LatentCondition, ModelConfig, parameters, preset
from cinemesh.model.inputs import IDS, LATENTS, training_inputs
from cinemesh.model.reference import Reference
from cinemesh.model.runner import StepRunner, data_share
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import linear_quadratic
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import collect, fill_shard, full, initial_values, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.units import Parameter
from cinemesh.parallel.runtime.mesh import Mesh

UPSAMPLER = "movie-gen-upsampler-7b"
ALL = "tp=2,cp=2,dp_shard=2,kv_slices=2,tp_slices=3,grad_units=2,recompute=full"


def upsampler(text: str) -> Case:
    return small_case(Plan.parse(text, dtype="float64"), UPSAMPLER)


def reported(case: Case) -> Report | None:
    return verify_on_rank(case)


@pytest.mark.parametrize("text", ["tp=1", "tp=2,cp=2,dp_shard=2", ALL])
def test_the_upsampler_under_a_plan_is_the_reference(pool: Pool, text: str) -> None:
    case = upsampler(text)
    report = pool.run(case.plan.world_size, reported, case)[0]
    assert report is not None and report.ok, report
    assert max(report.worst.values()) <= FLOAT64_BOUND


def test_its_condition_reaches_loss_and_gradient() -> None:
    """A step that ignored the low-resolution latent would still be a model: of another loss."""
    case = upsampler("tp=1")
    (condition,) = case.config.latent_conditions
    gradients: list[Tensor] = []
    for scale in (1.0, 2.0):
        runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed)
        runner.initialise(probe_values(case.seed))
        batch = dict(global_batch(case, 0, 0))
        batch[condition.input] = scale * batch[condition.input]
        runner.load(0, batch)
        runner.step(0.0)
        gradients.append(runner.loss)
    assert gradients[0] != gradients[1]


def test_it_begins_as_the_model_without_the_condition() -> None:
    """Rows that start as zeros (Movie Gen 3.1.5): any low-resolution latent gives the velocity of none."""
    case = upsampler("tp=1")
    model = Reference(case.config).double()
    weights = full(parameters(case.config), initial_values(3), torch.float64)
    weights["final.weight"] = torch.randn_like(weights["final.weight"])  # zero too: the velocity would be zero
    model.load_state_dict(weights)
    batch = global_batch(case, 0, 0)
    (condition,) = case.config.latent_conditions
    t = torch.full((case.samples,), 0.4, dtype=torch.float64)
    plain = Reference(replace(case.config, latent_conditions=())).double()
    plain.load_state_dict({n: w for n, w in weights.items() if n != f"patchify.{condition.name}"})
    torch.testing.assert_close(model(batch[LATENTS], t, batch), plain(batch[LATENTS], t, batch), rtol=0, atol=0)
    named = {row.name: row for row in parameters(case.config)}[f"patchify.{condition.name}"]
    assert named.init == "zeros" and named.decay and named.shape[0] == 4 * condition.channels


def test_its_first_step_is_that_of_its_base_and_its_new_rows_learn() -> None:
    """Of the step's own program, bit by bit; with a head that is not zero, as of any model it begins with."""
    case = upsampler("tp=1")
    (condition,) = case.config.latent_conditions
    rows, losses = f"patchify.{condition.name}", list[Tensor]()

    def begun(row: Parameter, block: Tensor) -> Tensor:
        values = probe_values(case.seed)(row, block)
        return torch.zeros_like(values) if row.name == rows else values

    batch = dict(global_batch(case, 0, 0))
    runners: list[StepRunner] = []
    for config in (replace(case.config, latent_conditions=()), case.config):
        runner = StepRunner(config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed)
        runner.initialise(begun)
        runner.load(0, batch)
        runner.step(1e-3)
        losses.append(runner.loss)
        runners.append(runner)
    assert torch.equal(*losses)
    learnt = collect([(runners[1].coordinates, runners[1].buffers["exp_avg"])], runners[1].units)[rows]
    assert learnt.abs().mean() > 1e-9 and learnt.count_nonzero() == learnt.numel()


def sampled(case: Case, steps: int) -> tuple[int, Tensor]:
    mesh = Mesh(case.plan)
    units = unit_layout(case.config, case.plan)
    master = torch.empty(1, units.flat_elements, dtype=torch.float64)
    fill_shard(master, units, mesh.coordinates, probe_values(0))
    sampler = Sampler(case.config, case.plan, case.batch, mesh, master, guidance=1.0)
    inputs = training_inputs(case.config, case.plan, case.batch)
    mine = data_share(global_batch(case, 0, 0), inputs, case.plan, mesh.coordinates)
    made = sampler.sample(mine, 5, mine[IDS], linear_quadratic(steps))
    mesh.close()
    return mesh.data_rank, made


def test_sampling_takes_the_condition(pool: Pool) -> None:
    case, steps = upsampler("tp=2,cp=2,dp_shard=2"), 3
    batch = global_batch(case, 0, 0)
    model = Reference(case.config).double()
    model.load_state_dict(full(parameters(case.config), probe_values(0), torch.float64))
    shape = tuple(batch[LATENTS].shape[1:])
    nowhere = torch.zeros_like(batch[IDS])
    x = flow.draw_noise(5, torch.tensor(0), batch[IDS], nowhere, shape, flow.Purpose.SAMPLING)
    with torch.no_grad():
        for now, after in pairwise(linear_quadratic(steps)):
            t = torch.full((len(x),), now, dtype=torch.float64)
            x = x + (after - now) * model(x, t, batch)
    for data_rank, got in pool.run(8, sampled, case, steps):
        torch.testing.assert_close(got, x.chunk(2)[data_rank], rtol=0, atol=1e-9)


def test_it_is_linted_whole() -> None:
    assert lint(Plan.parse("tp=2,cp=2,dp_shard=4"), UPSAMPLER) == []


@pytest.mark.parametrize("model", [name for name in PRESETS if name != "tiny"])
def test_the_small_case_is_the_model_that_was_asked_for(model: str) -> None:
    """Shrunk are sizes alone; any other field stays, also one that does not exist yet."""
    asked, case = preset(model), small_case(Plan(), model)
    sizes = {"name", "layers", "width", "heads", "ffn", "encoders", "channels", "position_lengths", "latent_conditions"}
    for field in fields(ModelConfig):
        if field.name not in sizes:
            assert getattr(case.config, field.name) == getattr(asked, field.name)
    named = [condition.name for condition in asked.latent_conditions]
    assert [condition.name for condition in case.config.latent_conditions] == named
    assert [encoder.name for encoder in case.config.encoders] == [encoder.name for encoder in asked.encoders]
    assert case.config.tokens(case.latent) > 0 and asked.tokens(USUAL_LATENTS[model]) > 0


def test_an_image_model_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time axis: one position in time, whatever the plan asks of the tokens."""
    monkeypatch.setitem(PRESETS, "images", replace(preset("movie-gen-5b"), name="images", position_lengths=(1, 64, 64)))
    monkeypatch.setitem(USUAL_LATENTS, "images", (1, 128, 128))
    case = small_case(Plan.parse("tp=2,cp=2,kv_chunks=2"), "images")
    assert case.latent[0] == 1 and case.config.position_lengths[0] <= 2


def test_a_plan_that_the_model_refuses_is_refused() -> None:
    """Grown until the plan divides it, a small case would prove what cannot run."""
    with pytest.raises(CinemeshError, match=r"heads\(48\) % tp\(5\) = 3"):
        small_case(Plan.parse("tp=5"), "movie-gen-30b")


def test_a_batch_without_the_condition_is_refused() -> None:
    case = upsampler("tp=1")
    runner = StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed)
    batch = dict(global_batch(case, 0, 0))
    del batch[case.config.latent_conditions[0].input]
    with pytest.raises(CinemeshError, match=r"a batch without latents\.low_resolution: .* takes ids, places, mask, "):
        runner.load(0, batch)
    load_batch(case, runner, 0)  # whole, it is taken


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ([LatentCondition("weight", 4)], "not 'weight'"),
        ([LatentCondition("a", 4), LatentCondition("a", 4)], "a name of its own"),
        ([LatentCondition("a.b", 4)], "letters, digits and underscores"),
        ([LatentCondition("a", 0)], "at least 1"),
    ],
)
def test_conditions_that_cannot_be(conditions: list[Any], said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        replace(preset("tiny"), latent_conditions=tuple(conditions))
