"""The sampler: the schedule's numbers, and any plan against a plain Euler loop on the reference model."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from harness import Pool
from sampling import LATENT, SAMPLES, SEED, STEPS, TINY, captions, noise
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.model import flow
from cinemesh.model.config import parameters
from cinemesh.model.inputs import IDS, MASK, BatchShape, text_input, training_inputs
from cinemesh.model.reference import Reference
from cinemesh.model.runner import data_share
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import SCHEDULES, SOLVERS, SolverName, equal_steps, linear_quadratic
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import Values, fill_shard, full, probe_values
from cinemesh.parallel.ir.nccl_stack import Capture
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.executor import Executor
from cinemesh.parallel.runtime.frozen import Frozen
from cinemesh.parallel.runtime.mesh import Mesh, coordinates


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


def sampled(
    plan: Plan,
    values: Values,
    guidance: float,
    mesh: Mesh | None = None,
    steps: int = STEPS,
    *,
    capture: Capture = "off",
    solver: SolverName = "euler",
    apart: bool = False,
) -> Tensor:
    """What this rank gets. ``apart``: replicas make halves of the same samples."""
    position = mesh.coordinates if mesh else coordinates(plan, 0)
    units = unit_layout(TINY, plan)
    master = torch.empty(1, units.flat_elements, dtype=torch.float64)
    fill_shard(master, units, position, values)
    before = master.clone()
    batch = BatchShape(SAMPLES // (plan.dp_shard if apart else plan.data_ranks), LATENT)
    given, at = (replace(plan, dp_replicate=1), position | {"dp_replicate": 0}) if apart else (plan, position)
    mine = data_share(captions(), training_inputs(TINY, given, batch), given, at)
    sampler = Sampler(TINY, plan, batch, mesh, master, guidance=guidance, apart=apart)
    assert sampler.capture(capture) is None and (sampler.replay is not None) == (capture != "off")
    latents = sampler.sample(mine, SEED, mine[IDS], linear_quadratic(steps), SOLVERS[solver])
    assert torch.equal(master, before)
    return latents


def sampled_on_rank(plan: Plan, guidance: float) -> tuple[int, Tensor, Tensor]:
    """From the executor, and captured."""
    mesh = Mesh(plan)
    made = sampled(plan, probe_values(0), guidance, mesh)
    return mesh.data_rank, made, sampled(plan, probe_values(0), guidance, mesh, capture="required")


def apart_on_rank(plan: Plan, guidance: float) -> tuple[int, Tensor, Tensor]:
    """Of each half on a group of ranks: from the executor, and captured."""
    mesh = Mesh(plan)
    made = sampled(plan, probe_values(0), guidance, mesh, apart=True)
    captured = sampled(plan, probe_values(0), guidance, mesh, apart=True, capture="required")
    return mesh.coordinates["dp_shard"], made, captured


@pytest.mark.parametrize("text", ["dp_replicate=2", "dp_replicate=2,dp_shard=2", "dp_replicate=2,tp=2,cp=2"])
def test_halves_on_two_groups_of_ranks_are_one_batch_of_two(pool: Pool, text: str) -> None:
    """Every rank of either group ends with the guided clip; captured, with the same bits."""
    plan, guidance = Plan.parse(text, dtype="float64"), 3.0
    wanted = euler_on_reference(guidance).chunk(plan.dp_shard)
    for at, got, captured in pool.run(plan.world_size, apart_on_rank, plan, guidance):
        assert (got - wanted[at]).abs().max() <= 1e-10 * wanted[at].abs().max()
        assert torch.equal(captured, got)


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
    """Noise, tokens and captions are each rank's own part; every rank of a sample ends with all of it.

    To 1e-10 of what one process makes; captured, to the bits of the executor.
    """
    plan = Plan.parse(text, dtype="float64")
    want, one = euler_on_reference(3.0), sampled(Plan(dtype="float64"), probe_values(0), 3.0)
    for data_rank, latents, replayed in pool.run(plan.world_size, sampled_on_rank, plan, 3.0):
        torch.testing.assert_close(latents, want.chunk(plan.data_ranks)[data_rank], rtol=0, atol=1e-9)
        due = one.chunk(plan.data_ranks)[data_rank]
        assert (latents - due).abs().max() <= 1e-10 * due.abs().max()
        assert torch.equal(replayed, latents)


def test_both_halves_of_the_guidance_are_one_run_of_one_program() -> None:
    """Twice the samples in it; one run a velocity, whether it is captured or not."""
    plan = Plan(dtype="float32")
    units = unit_layout(TINY, plan)
    master = torch.empty(1, units.flat_elements)
    fill_shard(master, units, coordinates(plan, 0), probe_values(0))
    for guidance, samples in ((3.0, 2 * SAMPLES), (1.0, SAMPLES), (0.0, SAMPLES)):
        sampler = Sampler(TINY, plan, BatchShape(SAMPLES, LATENT), None, master, guidance=guidance)
        assert sampler.velocity.program.buffers[sampler.velocity.program.states["velocity"]].shape[1] == samples
        runs, run = list[None](), Executor.run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Executor, "run", lambda *of, run=run, runs=runs: (runs.append(None), run(*of))[1])
            sampler.sample(captions(), SEED, captions()[IDS], linear_quadratic(STEPS))
        assert len(runs) == STEPS + 1, "a velocity a step, and the tokens put together"


def test_what_cannot_be_captured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the op's name; required, it is refused. Otherwise the executor runs, and the clip is the same."""
    plan, given = Plan(dtype="float32"), captions()
    units = unit_layout(TINY, plan)
    sampler = Sampler(TINY, plan, BatchShape(SAMPLES, LATENT), None, torch.zeros(1, units.flat_elements))
    assert sampler.capture("off") is None and sampler.replay is None
    want = sampler.sample(given, SEED, given[IDS], [0.0, 1.0])
    record = Frozen.record

    def hazardous(self: Frozen) -> None:
        record(self)
        self.hazards.append("attention: reads from the device")

    monkeypatch.setattr(Frozen, "record", hazardous)
    assert sampler.capture() == "rank 0: attention: reads from the device" and sampler.replay is None
    with pytest.raises(CinemeshError, match="attention: reads from the device"):
        sampler.capture("required")
    assert torch.equal(sampler.sample(given, SEED, given[IDS], [0.0, 1.0]), want)


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
    sampler = Sampler(TINY, plan, BatchShape(SAMPLES, LATENT), None, master, guidance=1.0)
    got = sampler.sample(given, SEED, given[IDS], linear_quadratic(STEPS))
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    want = euler_on_reference(1.0)
    assert (got - want).abs().max() < 0.05 * want.abs().max()


# -- schedules and solvers --------------------------------------------------------------------------------------------


def solved(solver: SolverName, steps: int) -> float:
    """x' = x cos 2t from 1 at t = 0, at t = 1: by the tableau alone."""
    x = 1.0
    for t, after in pairwise(equal_steps(steps)):
        h, ks, of = after - t, list[float](), SOLVERS[solver]
        for node, row in zip(of.nodes, of.rows, strict=True):
            at = x + h * sum(a * k for a, k in zip(row, ks, strict=True))
            ks.append(at * math.cos(2 * (t + node * h)))
        x += h * sum(b * k for b, k in zip(of.weights, ks, strict=True))
    return x


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("dopri5", 5)])
def test_a_solver_has_its_order(solver: SolverName, order: int) -> None:
    """Half the step, 2**order less of an error. A wrong digit in a tableau lowers the order."""
    exact = math.exp(math.sin(2.0) / 2)
    errors = [abs(solved(solver, steps) - exact) for steps in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)
    of = SOLVERS[solver]
    assert [sum(row) for row in of.rows] == pytest.approx(of.nodes) and sum(of.weights) == pytest.approx(1)


def test_linear_times_are_equally_far_apart() -> None:
    assert equal_steps(4) == [0.0, 0.25, 0.5, 0.75, 1.0] and SCHEDULES["linear"](3)[-1] == 1.0


def test_midpoint_is_that_of_the_reference() -> None:
    """Nodes and shares reach the velocity: of the plain model, written out."""
    model = Reference(TINY).double()
    model.load_state_dict(full(parameters(TINY), probe_values(0), torch.float64))
    given, x = captions(), noise()
    with torch.no_grad():
        for now, after in pairwise(linear_quadratic(3)):
            h, t = after - now, torch.full((SAMPLES,), now, dtype=torch.float64)
            x = x + h * model(x + h / 2 * model(x, t, given), t + h / 2, given)
    got = sampled(Plan(dtype="float64"), probe_values(0), 1.0, steps=3, solver="midpoint")
    torch.testing.assert_close(got, x, rtol=0, atol=1e-9)


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
    sampler.sample({name: given[name].as_subclass(Moved) for name in text}, SEED, given[IDS], linear_quadratic(STEPS))
    assert Moved.times == len(text)
