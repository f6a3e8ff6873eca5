"""What every block changes of the residual stream, against hooks on the plain model, under any plan and solver."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from harness import Pool
from sampling import LATENT, SAMPLES, SEED, STEPS, TINY, captions, noise
from torch import Tensor, nn

from cinemesh.launch.training.block_change import BlockChange
from cinemesh.model import flow
from cinemesh.model.config import parameters
from cinemesh.model.inputs import IDS, MASK, BatchShape, text_input, training_inputs
from cinemesh.model.reference import Reference
from cinemesh.model.runner import data_share
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import SOLVERS, SolverName, linear_quadratic
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import fill_shard, full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh, coordinates

GUIDANCE = 3.0
MODEL = replace(TINY, layers=4)


def traced(
    plan: Plan, mesh: Mesh | None = None, *, solver: SolverName = "euler", apart: bool = False, counted: bool = True
) -> tuple[Tensor, Tensor]:
    """Latents of this rank, and the changes; of a captured sampler, which then has to run record by record."""
    position = mesh.coordinates if mesh else coordinates(plan, 0)
    units = unit_layout(MODEL, plan)
    master = torch.empty(1, units.flat_elements, dtype=torch.float64)
    fill_shard(master, units, position, probe_values(0))
    ranks = plan.dp_shard if apart else plan.data_ranks
    batch = BatchShape(SAMPLES // ranks, LATENT)
    given, at = (plan.with_degrees(dp_replicate=1), position | {"dp_replicate": 0}) if apart else (plan, position)
    mine = data_share(captions(), training_inputs(MODEL, given, batch), given, at)
    sampler = Sampler(MODEL, plan, batch, mesh, master, guidance=GUIDANCE, apart=apart)
    assert sampler.capture("required") is None
    change = BlockChange(sampler, STEPS)
    counts = torch.full((SAMPLES // ranks,), counted)
    times = linear_quadratic(STEPS)
    latents = sampler.sample(mine, SEED, mine[IDS], times, SOLVERS[solver], lambda step: change.begin(step, counts))
    return latents, change.changes()


def by_hooks() -> Tensor:
    """[steps, blocks], of a plain loop over the plain model, both halves of the guidance together."""
    model = Reference(MODEL).double()
    model.load_state_dict(full(parameters(MODEL), probe_values(0), torch.float64))
    sums = torch.zeros(2, STEPS, MODEL.layers, dtype=torch.float64)
    step = 0

    def hook(block: int) -> object:
        def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            sums[0, step, block] += (out - args[0]).square().sum()
            sums[1, step, block] += args[0].square().sum()

        return add

    for number, block in enumerate(model.blocks):
        block.register_forward_hook(hook(number))  # pyright: ignore[reportArgumentType]
    given, null = captions(), {MASK: torch.ones_like(captions()[MASK])}
    for name in (text_input(e.name) for e in MODEL.encoders):
        null[name] = flow.drop_captions(given[name], given[MASK], torch.zeros(SAMPLES, dtype=torch.bool))[0]
    x = noise()
    with torch.no_grad():
        for step, (now, after) in enumerate(pairwise(linear_quadratic(STEPS))):  # noqa: B007  the hooks read it
            t = torch.full((SAMPLES,), now, dtype=torch.float64)
            with_caption, without = model(x, t, given), model(x, t, null)
            x = x + (after - now) * (without + GUIDANCE * (with_caption - without))
    moved, before = sums
    return (moved / before).sqrt()


def test_changes_are_those_of_the_plain_model() -> None:
    _, changes = traced(Plan(dtype="float64"))
    assert changes.shape == (STEPS, MODEL.layers) and MODEL.layers > 2
    torch.testing.assert_close(changes, by_hooks(), rtol=1e-10, atol=0)
    assert changes.std(0).min() > 0 and changes.std(1).min() > 0, "steps and blocks differ, so a swapped one is seen"


def traced_on_rank(plan: Plan, apart: bool) -> tuple[Tensor, Tensor]:
    return traced(plan, Mesh(plan), apart=apart)


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        ("dp_shard=2", False),
        ("tp=2,cp=2,kv_slices=3,tp_slices=3", False),
        ("tp=2,fused_tp=true", False),
        ("dp_replicate=2,tp=2", False),
        ("dp_replicate=2,cp=2", True),
    ],
)
def test_every_plan_finds_the_same_changes(pool: Pool, text: str, apart: bool) -> None:
    """Whatever of the stream is a rank's own, in slices or whole; also of halves on two groups of ranks."""
    plan = Plan.parse(text, dtype="float64")
    _, wanted = traced(Plan(dtype="float64"))
    for _, changes in pool.run(plan.world_size, traced_on_rank, plan, apart):
        torch.testing.assert_close(changes, wanted, rtol=1e-10, atol=0)


def test_what_is_watched_is_the_clip_that_is_captured() -> None:
    plan = Plan(dtype="float32")
    units = unit_layout(MODEL, plan)
    master = torch.empty(1, units.flat_elements)
    fill_shard(master, units, coordinates(plan, 0), probe_values(0))
    made = []
    for watched in (False, True):
        sampler = Sampler(MODEL, plan, BatchShape(SAMPLES, LATENT), None, master, guidance=GUIDANCE)
        sampler.capture("required")
        if watched:
            change = BlockChange(sampler, STEPS)
            change.begin(0, torch.ones(SAMPLES, dtype=torch.bool))
        made.append(sampler.sample(captions(), SEED, captions()[IDS], linear_quadratic(STEPS)))
    assert torch.equal(*made)


def test_every_velocity_of_a_step_counts_and_a_clip_that_is_dropped_does_not() -> None:
    """Midpoint's second velocity is at another t; nothing divided by nothing is no number."""
    _, euler = traced(Plan(dtype="float64"))
    _, midpoint = traced(Plan(dtype="float64"), solver="midpoint")
    assert not torch.allclose(euler, midpoint, rtol=1e-6)
    _, nothing = traced(Plan(dtype="float64"), counted=False)
    assert nothing.isnan().all()
