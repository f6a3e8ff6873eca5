"""Objectives against formulas that are written anew here: levels, targets, the data of a prediction, whole samplers.

Only this sees v-prediction that is consistent with itself and wrong: a last level that leaks signal, a target of the
wrong sign, a sampler that starts where no sample was noised.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Pool
from noise_levels import at_level, data_of
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.models import read_model
from cinemesh.launch.proof.bounds import FLOAT64_BOUND
from cinemesh.launch.proof.lint import lint
from cinemesh.launch.proof.parity import Case, global_batch
from cinemesh.launch.proof.verify import Report, small_case, verify_on_rank
from cinemesh.model import flow
from cinemesh.model.config import parameters, preset
from cinemesh.model.inputs import IDS, LATENTS, training_inputs
from cinemesh.model.objective import OBJECTIVES, V_PREDICTION, ObjectiveName
from cinemesh.model.paths import DIFFUSION, PATHS, zero_terminal
from cinemesh.model.reference import Reference, training_loss
from cinemesh.model.runner import data_share
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import SOLVERS
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import fill_shard, full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh


def rescaled_betas() -> np.ndarray:
    """Algorithm 1 of Lin et al. 2023, by its own steps: betas in, betas out."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    first, last = root[0], root[-1]
    root = (root - last) * first / (first - last)
    bars = root**2
    alphas = np.concatenate([bars[:1], bars[1:] / bars[:-1]])
    return 1 - alphas


def case_of(objective: ObjectiveName, text: str) -> Case:
    case = small_case(Plan.parse(text, dtype="float64"), "tiny")
    return replace(case, config=replace(case.config, objective=objective))


def test_the_last_level_has_no_signal_and_the_first_is_as_it_was() -> None:
    levels = DIFFUSION.signal.numpy()
    wanted = np.sqrt(np.cumprod(1 - rescaled_betas()))
    assert levels[0] == 1 and levels[-1] == 0
    np.testing.assert_allclose(levels[1:], wanted, rtol=0, atol=1e-13)
    plain = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    assert levels[1] == pytest.approx(plain[0], abs=1e-14)
    assert plain[-1] > 0.06, "what the schedule leaks without the rescaling"
    assert (np.diff(levels) < 0).all()


def test_v_is_how_a_sample_turns() -> None:
    """With alpha = cos a and sigma = sin a, v is the derivative of x_t with respect to the angle."""
    x1, x0 = (torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.0, 0.4, 0.999], dtype=torch.float64)
    x_t, v = DIFFUSION.noised(x1, x0, t)
    angle = torch.acos(DIFFUSION.levels(t)[0])[:, None, None]
    h = 1e-6
    turned = [torch.cos(angle + s) * x1 + torch.sin(angle + s) * x0 for s in (-h, 0.0, h)]
    torch.testing.assert_close(x_t, turned[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(v, (turned[2] - turned[0]) / (2 * h), rtol=0, atol=1e-8)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(v[0], -x1[0]), "t = 0 is noise alone, and v there the data"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_right_prediction_stands_for_the_data(objective: ObjectiveName) -> None:
    """At every t, pure noise too: nothing is divided by a signal that is not there."""
    path = PATHS[objective]
    t = torch.arange(0, 1000, dtype=torch.float64) / 1000
    x1, x0 = (torch.randn(len(t), 7, dtype=torch.float64) for _ in range(2))
    x_t, target = path.noised(x1, x0, t)
    torch.testing.assert_close(data_of(objective, x_t, target, t), x1, rtol=0, atol=1e-12)
    wrong = data_of(objective, x_t, target + 0.1, t) - x1  # how an error of the prediction becomes one of data
    shares = 1 - (1 - 1e-5) * t if objective == "flow-matching" else -(1 - DIFFUSION.signal.flip(0)[:-1] ** 2).sqrt()
    torch.testing.assert_close(wrong, 0.1 * shares[:, None].expand_as(wrong), rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n", [1000, 900, 250, 1])
def test_both_can_be_asked_of_one_noised_sample(objective: ObjectiveName, n: int) -> None:
    signal = DIFFUSION.signal[n].item()
    x1, x0 = (torch.randn(2, 7, dtype=torch.float64) for _ in range(2))
    t, scale = at_level(objective, signal)
    x_t, _ = PATHS[objective].noised(x1, x0, torch.full((2,), t, dtype=torch.float64))
    wanted = signal * x1 + math.sqrt(1 - signal**2) * x0
    torch.testing.assert_close(x_t * scale, wanted, rtol=0, atol=1e-12)


def test_every_step_of_noise_is_drawn_alike() -> None:
    ids = torch.arange(40_000)
    t = DIFFUSION.draw_time(3, torch.tensor(0), ids, torch.zeros_like(ids))
    n = ((1 - t) * 1000).round()
    assert n.min() == 1 and n.max() == 1000
    counts = torch.histc(n, 10, 1, 1000)
    assert (counts - 4000).abs().max() < 5 * math.sqrt(4000)
    assert t.dtype == torch.float64 and not torch.equal(t, flow.draw_time(3, torch.tensor(0), ids, ids * 0))


def reported(case: Case) -> Report | None:
    return verify_on_rank(case)


@pytest.mark.parametrize("text", ["recompute=full,micro_batches=2", "tp=2,cp=2,dp_shard=2"])
def test_a_step_of_v_prediction_is_the_reference(pool: Pool, text: str) -> None:
    case = case_of("v-prediction", text)
    report = pool.run(case.plan.world_size, reported, case)[0]
    assert report is not None and report.ok, report
    assert max(report.worst.values()) <= FLOAT64_BOUND


def test_the_loss_is_that_of_the_objective() -> None:
    """Written out: draws, levels and target, all with NumPy."""
    case = case_of("v-prediction", "tp=1")
    model = Reference(case.config).double()
    model.load_state_dict(full(parameters(case.config), probe_values(0), torch.float64))
    batch = global_batch(case, 0, 0)
    got = training_loss(model, batch, 0, 0, 0.0)
    latent, ids = batch[LATENTS], batch[IDS]
    t = DIFFUSION.draw_time(0, torch.tensor(0), ids, batch["places"])
    bars = np.cumprod(1 - rescaled_betas())[((1 - t) * 1000).round().long().numpy() - 1].reshape(-1, 1, 1, 1, 1)
    x0 = flow.draw_noise(0, torch.tensor(0), ids, batch["places"], tuple(latent.shape[1:])).numpy()
    x_t = np.sqrt(bars) * latent.numpy() + np.sqrt(1 - bars) * x0
    v = np.sqrt(bars) * x0 - np.sqrt(1 - bars) * latent.numpy()
    predicted = model(torch.from_numpy(x_t), t, batch).detach().numpy()
    assert got.item() == pytest.approx(((predicted - v) ** 2).mean(), rel=1e-10)
    assert got.item() != pytest.approx(((predicted + v) ** 2).mean(), rel=1e-3), "a target of the other sign is seen"


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_a_perfect_model_is_followed_to_the_data() -> None:
    """From noise alone, in one step or in many; the times are the trailing ones of Lin et al., table 2."""
    x1, x = (torch.randn(2, 9, dtype=torch.float64) for _ in range(2))

    def exact(x: Tensor, t: float) -> Tensor:
        alpha, sigma = DIFFUSION.levels(torch.tensor(t))
        return (alpha * x - x1) / sigma

    for steps in (1, 7, 50):
        times = DIFFUSION.times("linear", steps)
        made = x
        for t, after in pairwise(times):
            made = DIFFUSION.advanced(made, t, after, exact, SOLVERS["euler"])
        torch.testing.assert_close(made, x1, rtol=0, atol=1e-12)
    trailing = np.round(np.arange(1000, 0, -1000 / 10)) - 1  # indices from 0, of ten steps
    assert [round((1 - t) * 1000) - 1 for t in DIFFUSION.times("linear", 10)[:-1]] == trailing.tolist()


def sampled(case: Case, steps: int) -> tuple[int, Tensor]:
    mesh = Mesh(case.plan)
    master = torch.empty(1, unit_layout(case.config, case.plan).flat_elements, dtype=torch.float64)
    fill_shard(master, unit_layout(case.config, case.plan), mesh.coordinates, probe_values(0))
    sampler = Sampler(case.config, case.plan, case.batch, mesh, master, guidance=1.0)
    inputs = training_inputs(case.config, case.plan, case.batch)
    mine = data_share(global_batch(case, 0, 0), inputs, case.plan, mesh.coordinates)
    made = sampler.sample(mine, 5, mine[IDS], DIFFUSION.times("linear", steps))
    mesh.close()
    return mesh.data_rank, made


def test_the_sampler_is_ddim_under_any_plan(pool: Pool) -> None:
    """Song et al. 2021, equation 12 without noise, on the reference; its first step has no signal to divide by."""
    case, steps = case_of("v-prediction", "tp=2,cp=2,dp_shard=2"), 4
    batch = global_batch(case, 0, 0)
    model = Reference(case.config).double()
    model.load_state_dict(full(parameters(case.config), probe_values(0), torch.float64))
    shape = tuple(batch[LATENTS].shape[1:])
    nowhere = torch.zeros_like(batch[IDS])
    x = flow.draw_noise(5, torch.tensor(0), batch[IDS], nowhere, shape, flow.Purpose.SAMPLING)
    bars = np.concatenate([[1.0], np.cumprod(1 - rescaled_betas())])
    with torch.no_grad():
        for n, after in ((1000, 750), (750, 500), (500, 250), (250, 0)):
            v = model(x, torch.full((len(x),), 1 - n / 1000, dtype=torch.float64), batch)
            data = bars[n] ** 0.5 * x - (1 - bars[n]) ** 0.5 * v
            noise = bars[n] ** 0.5 * v + (1 - bars[n]) ** 0.5 * x
            x = bars[after] ** 0.5 * data + (1 - bars[after]) ** 0.5 * noise
    assert torch.isfinite(x).all()
    for data_rank, got in pool.run(8, sampled, case, steps):
        torch.testing.assert_close(got, x.chunk(2)[data_rank], rtol=0, atol=1e-9)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_follow_it_is_refused() -> None:
    with pytest.raises(CinemeshError, match="solver is midpoint, and a model of v-prediction"):
        DIFFUSION.check_sampler("midpoint", 50)
    with pytest.raises(CinemeshError, match=r"sample.steps\(1001\) > 1000"):
        DIFFUSION.check_sampler("euler", 1001)
    DIFFUSION.check_sampler("euler", 1000)
    PATHS["flow-matching"].check_sampler("dopri5", 5000)


def test_another_objective_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match="objective is 'v'"):
        replace(preset("tiny"), objective="v")  # type: ignore[arg-type]
    path = tmp_path / "model.yaml"
    path.write_text("preset: tiny\nobjective: v-predicton\n")
    with pytest.raises(CinemeshError, match="objective is 'v-predicton'") as error:
        read_model(str(path))
    assert "v-prediction" in str(error.value.remedy)
    path.write_text("preset: tiny\nobjective: v-prediction\n")
    assert lint(Plan.parse("tp=2"), str(path)) == []


def test_no_level_between_levels() -> None:
    with pytest.raises(ValueError, match="no step of noise leaves a signal"):
        at_level("v-prediction", 0.9999)
    assert V_PREDICTION.steps == 1000 and zero_terminal(10, 1e-3, 0.5)[-1] == 0
