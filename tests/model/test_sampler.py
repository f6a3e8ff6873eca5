"""The sampler: the schedule's numbers, and any plan against a plain Euler loop on the reference model."""

from itertools import pairwise

import pytest
import torch
from harness import Pool
from torch import Tensor

from cinemesh.kernels.philox import Purpose
from cinemesh.model import flow
from cinemesh.model.config import parameters, preset
from cinemesh.model.inputs import IDS, MASK, BatchShape, text_input, training_inputs
from cinemesh.model.reference import Reference
from cinemesh.model.runner import data_share
from cinemesh.model.sampler import Sampler, linear_quadratic
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import Values, fill_shard, full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh, coordinates

TINY = preset("tiny")
LATENT = (3, 4, 12)
SAMPLES = 2  # of the whole job
STEPS = 6
SEED = 5


def test_schedule_has_the_values_of_the_public_reading() -> None:
    """S = 50, N = 250: the table made from Mochi's coefficients a i^2 + b i + c, apart from this closed form."""
    times = linear_quadratic(50)
    table = {0: 0.0, 1: 0.004, 24: 0.0960, 25: 0.1000, 26: 0.1053, 27: 0.1131, 30: 0.1520}
    table |= {40: 0.4480, 45: 0.6920, 49: 0.9333, 50: 1.0}
    assert len(times) == 51
    assert {i: round(times[i], 4) for i in table} == table
    tau, linear, rest = 0.1, 25, 25
    bend = linear - tau * 50
    a, b, c = bend / (linear * rest**2), tau / linear - 2 * bend / rest**2, bend / rest**2 * linear
    assert times[25:] == pytest.approx([a * i * i + b * i + c for i in range(25, 51)], abs=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 50, 249, 250, 251, 1000])
def test_schedule_rises_from_0_to_1(steps: int) -> None:
    """For odd step counts and for more steps than are emulated, too; no step is longer than the one after it."""
    times = linear_quadratic(steps)
    lengths = [b - a for a, b in pairwise(times)]
    assert times[0] == 0 and times[-1] == 1 and len(lengths) == steps and min(lengths) > 0
    assert all(b > a - 1e-12 for a, b in pairwise(lengths))
    if steps >= 250:
        assert lengths == pytest.approx([1 / steps] * steps)


def captions() -> dict[str, Tensor]:
    """Text [L, B, W] of each encoder, mask [B, L] and ids [B] of all samples, by input name."""
    generator = torch.Generator().manual_seed(3)
    text = {
        text_input(e.name): torch.randn((e.tokens, SAMPLES, e.width), generator=generator, dtype=torch.float64)
        for e in TINY.encoders
    }
    mask = torch.rand((SAMPLES, TINY.text_tokens), generator=generator) > 0.4
    mask[:, 0] = True
    return {**text, MASK: mask, IDS: torch.tensor([11, 4])}


def sampled(plan: Plan, values: Values, guidance: float, mesh: Mesh | None = None, steps: int = STEPS) -> Tensor:
    """What this rank gets."""
    position = mesh.coordinates if mesh else coordinates(plan, 0)
    units = unit_layout(TINY, plan)
    master = torch.empty(1, units.flat_elements, dtype=torch.float64)
    fill_shard(master, units, position, values)
    before = master.clone()
    batch = BatchShape(SAMPLES // plan.data_ranks, LATENT)
    mine = data_share(captions(), training_inputs(TINY, plan, batch), plan, position)
    sampler = Sampler(TINY, plan, batch, mesh, master)
    latents = sampler.sample(mine, SEED, mine[IDS], steps, guidance)
    assert torch.equal(master, before)
    return latents


def sampled_on_rank(plan: Plan, guidance: float) -> tuple[int, Tensor]:
    mesh = Mesh(plan)
    return mesh.data_rank, sampled(plan, probe_values(0), guidance, mesh)


def noise() -> Tensor:
    ids = captions()[IDS]
    shape = (TINY.channels, *LATENT)
    return flow.draw_noise(SEED, torch.tensor(0), ids, torch.zeros_like(ids), shape, Purpose.SAMPLING)


def euler_on_reference(guidance: float) -> Tensor:
    """Written out plainly; guidance always in full."""
    model = Reference(TINY).double()
    model.load_state_dict(full(parameters(TINY), probe_values(0), torch.float64))
    given = captions()
    drop = torch.zeros(SAMPLES, dtype=torch.bool)
    null = {MASK: torch.ones_like(given[MASK])}
    for name in (text_input(e.name) for e in TINY.encoders):
        null[name] = flow.drop_captions(given[name], given[MASK], drop)[0]
    x = noise()
    with torch.no_grad():
        for now, after in pairwise(linear_quadratic(STEPS)):
            t = torch.full((SAMPLES,), now, dtype=torch.float64)
            conditional = model(x, t, given)
            unconditional = model(x, t, null)
            x = x + (after - now) * (unconditional + guidance * (conditional - unconditional))
    return x


@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
def test_one_process_is_euler_on_the_reference(guidance: float) -> None:
    """1 is the conditional model alone and 0 the unconditional one: the shortcuts change nothing."""
    got = sampled(Plan(dtype="float64"), probe_values(0), guidance)
    torch.testing.assert_close(got, euler_on_reference(guidance), rtol=0, atol=1e-9)


SLICED = "tp=2,cp=2,kv_slices=3,tp_slices=3"
LAST = "tp=2,recompute_last=full,last_blocks=1"  # of the blocks, which not every program of a sampler has


@pytest.mark.parametrize(
    "text", ["tp=2", "cp=2", "dp_shard=2", "tp=2,cp=2", "dp_replicate=2,tp=2", SLICED, "tp=2,fused_tp=true", LAST]
)
def test_every_plan_samples_the_same(pool: Pool, text: str) -> None:
    """Noise, tokens and captions are each rank's own part; every rank of a sample ends with all of it."""
    plan = Plan.parse(text, dtype="float64")
    want = euler_on_reference(3.0)
    for data_rank, latents in pool.run(plan.world_size, sampled_on_rank, plan, 3.0):
        torch.testing.assert_close(latents, want.chunk(plan.data_ranks)[data_rank], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 5])
def test_constant_velocity_is_integrated_exactly(steps: int) -> None:
    """Only the final shift and projection are not zero, so v is one vector for all tokens; the times must sum to 1."""
    weights = {row.name: torch.zeros(row.shape, dtype=torch.float64) for row in parameters(TINY)}
    weights["final.table"][0] = torch.linspace(-1, 1, TINY.width, dtype=torch.float64)
    weights["final.weight"][:] = torch.linspace(0, 2, TINY.patch_features, dtype=torch.float64)[None] + 0.1
    weights["final.weight"][0] *= 2
    v = weights["final.table"][0] @ weights["final.weight"]  # [P], in (C, kt, kh, kw) order
    tile = v.view(1, TINY.channels, *TINY.patch)
    want = noise() + tile.repeat(1, 1, 3, 2, 6)
    assert v.abs().max() > 0.1
    got = sampled(Plan(dtype="float64"), lambda p, block: weights[p.name].reshape(-1, 4)[block], 4.0, steps=steps)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_bf16_integrates_in_float32() -> None:
    """The latent is not rounded to bf16 at the end, nor between steps; it stays near the float64 clip."""
    plan = Plan(dtype="bf16")
    units = unit_layout(TINY, plan)
    master = torch.empty(1, units.flat_elements)
    fill_shard(master, units, coordinates(plan, 0), probe_values(0))
    given = captions()
    got = Sampler(TINY, plan, BatchShape(SAMPLES, LATENT), None, master).sample(given, SEED, given[IDS], STEPS, 1.0)
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    want = euler_on_reference(1.0)
    assert (got - want).abs().max() < 0.05 * want.abs().max()


class Moved(Tensor):
    """Text that counts how often it is asked to move."""

    times = 0

    def to(self, *given: object, **named: object) -> Tensor:
        Moved.times += 1
        return super().to(*given, **named).as_subclass(Tensor)  # pyright: ignore[reportCallIssue,reportArgumentType]


def test_conditions_move_to_the_device_once_for_all_steps() -> None:
    """They were copied again, text for each encoder, at every velocity of every step."""
    plan, given = Plan(dtype="float32"), captions()
    units = unit_layout(TINY, plan)
    sampler = Sampler(TINY, plan, BatchShape(SAMPLES, LATENT), None, torch.zeros(1, units.flat_elements))
    Moved.times = 0
    text = [name for name in given if name != IDS]
    sampler.sample({name: given[name].as_subclass(Moved) for name in text}, SEED, given[IDS], STEPS, 2.0)
    assert Moved.times == len(text)
