"""A clip in windows that overlap: where they lie, that a blend of them is the whole, and the same under any plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness import Pool
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.kernels.philox import Purpose
from cinemesh.model import flow
from cinemesh.model.config import LatentCondition, ModelConfig, parameters, preset
from cinemesh.model.inputs import MASK, BatchShape, text_input
from cinemesh.model.reference import Reference
from cinemesh.model.runner import Batch
from cinemesh.model.sampler import Sampler
from cinemesh.model.solvers import SOLVERS, SolverName, linear_quadratic
from cinemesh.model.step import unit_layout
from cinemesh.model.weights import Values, fill_shard, full, probe_values
from cinemesh.model.windowed import WindowedSampler
from cinemesh.model.windows import OVERLAP, WINDOW, OverlappingWindows
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh, coordinates

CONDITION = LatentCondition("low_resolution", 4)
TINY = replace(preset("tiny"), position_lengths=(16, 4, 4), latent_conditions=(CONDITION,))
FRAMES, SIDE, STEPS, SEED, CLIP = 11, 4, 4, 5, 3
WINDOWS = OverlappingWindows(FRAMES, 5, 2)  # from 0, 3 and 6: two data ranks take two rounds, of which one repeats


# -- where they lie ---------------------------------------------------------------------------------------------------


def test_the_windows_are_the_papers() -> None:
    """14 frames of which 4 overlap (3.1.5); 256 frames are 26 windows of which the last is moved back."""
    windows = OverlappingWindows(256)
    assert (WINDOW, OVERLAP) == (14, 4) and len(windows.starts) == 26
    assert windows.starts[:3] == (0, 10, 20) and windows.starts[-2:] == (240, 242)
    assert OverlappingWindows(24).starts == (0, 10) and OverlappingWindows(14).starts == (0,)


@pytest.mark.parametrize(
    ("frames", "length", "overlap"), [(256, 14, 4), (15, 14, 4), (11, 5, 2), (9, 4, 3), (12, 4, 0)]
)
def test_every_frame_is_said_whole(frames: int, length: int, overlap: int) -> None:
    """And no two neighbours are farther apart than their stride."""
    windows = OverlappingWindows(frames, length, overlap)
    said = torch.zeros(frames, dtype=torch.float64)
    for start, share in zip(windows.starts, windows.shares, strict=True):
        assert min(share) > 0
        said[start : start + length] += torch.tensor(share, dtype=torch.float64)
    torch.testing.assert_close(said, torch.ones(frames, dtype=torch.float64), rtol=0, atol=1e-15)
    assert max(b - a for a, b in pairwise(windows.starts)) <= length - overlap


def test_the_weights_are_triangles() -> None:
    """Where windows 0-4 and 3-7 meet: 2 and 1 against 1 and 2; alone, one says all to the last bit."""
    shares = OverlappingWindows(8, 5, 2).shares
    assert shares == [[1.0, 1.0, 1.0, 2 / 3, 1 / 3], [1 / 3, 2 / 3, 1.0, 1.0, 1.0]]
    assert OverlappingWindows(9, 9, 3).shares == [[1.0] * 9]


@pytest.mark.parametrize(
    ("given", "said"),
    [((5, 14, 4), "a clip of 5 frames is shorter than a window of 14"), ((20, 4, 4), "begins 0 frames after"),
     ((20, 4, -1), "let 0 to 3 frames overlap"), ((20, 0, 0), "windows of 0 frames")],
)  # fmt: skip
def test_windows_that_cannot_be(given: tuple[int, int, int], said: str) -> None:
    with pytest.raises(CinemeshError, match=said):
        OverlappingWindows(*given)


# -- the sampler ------------------------------------------------------------------------------------------------------


def texts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {
        text_input(e.name): torch.randn((e.tokens, 1, e.width), generator=generator, dtype=torch.float64)
        for e in TINY.encoders
    }
    return made | {MASK: torch.rand((1, TINY.text_tokens), generator=generator) > 0.3}


def low_resolution(frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn((1, CONDITION.channels, frames, SIDE, SIDE), generator=generator, dtype=torch.float64)


def conditions(windows: OverlappingWindows) -> Callable[[int], Batch]:
    def of(number: int) -> Batch:
        start = windows.starts[number]
        return texts() | {CONDITION.input: low_resolution(windows.frames)[:, :, start : start + windows.length]}

    return of


def frame_local(values: Values) -> Values:
    """Weights of a model in which no frame sees another: no self-attention, one position in time for all."""

    def of(row: Any, *given: Any) -> Tensor:
        made = values(row, *given)
        if row.in_block == "o":
            made = torch.zeros_like(made)
        return made[:1].expand_as(made).clone() if row.name == "position.t" else made

    return of


def sampler_of(plan: Plan, frames: int, values: Values, mesh: Mesh | None, guidance: float = 1.0) -> Sampler:
    units, position = unit_layout(TINY, plan), mesh.coordinates if mesh else coordinates(plan, 0)
    master = torch.empty(1, units.flat_elements, dtype=torch.float64)
    fill_shard(master, units, position, values)
    return Sampler(TINY, plan, BatchShape(1, (frames, SIDE, SIDE)), mesh, master, guidance=guidance)


def made(
    plan: Plan,
    windows: OverlappingWindows = WINDOWS,
    values: Values | None = None,
    mesh: Mesh | None = None,
    guidance: float = 1.0,
    solver: SolverName = "euler",
) -> Tensor:
    sampler = sampler_of(plan, windows.length, values or probe_values(0), mesh, guidance)
    windowed = WindowedSampler(sampler, windows)
    clip = torch.tensor([CLIP])
    return windowed.sample(conditions(windows), SEED, clip, linear_quadratic(STEPS), SOLVERS[solver])


PLAIN = Plan(dtype="float64")


def test_one_window_is_no_window_bit_by_bit() -> None:
    whole = OverlappingWindows(FRAMES, FRAMES, 2)
    plain = sampler_of(PLAIN, FRAMES, probe_values(0), None)
    wanted = plain.sample(conditions(whole)(0), SEED, torch.tensor([CLIP]), linear_quadratic(STEPS))
    assert torch.equal(made(PLAIN, whole), wanted[0])


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_model_without_a_look_at_other_frames_is_its_windowed_self(solver: SolverName) -> None:
    """Its windows say of a frame what the whole does; noise is the whole clip's, or this would not hold at all."""
    values = frame_local(probe_values(0))
    whole = made(PLAIN, OverlappingWindows(FRAMES, FRAMES, 2), values, solver=solver)
    assert (made(PLAIN, WINDOWS, values, solver=solver) - whole).abs().max() <= 1e-12 * whole.abs().max()
    other = made(PLAIN, WINDOWS, solver=solver) - made(PLAIN, OverlappingWindows(FRAMES, FRAMES, 2), solver=solver)
    assert other.abs().max() > 1e-3, "the model itself does see them"


def blended_on_reference(windows: OverlappingWindows, weights: Mapping[str, Tensor], guidance: float) -> Tensor:
    """Euler steps written down: every window's velocity of the oracle, frame by frame, weighed by its triangle."""
    model = Reference(TINY).double()
    model.load_state_dict(dict(weights))
    shape = (TINY.channels, windows.frames, SIDE, SIDE)
    zero = torch.zeros(1, dtype=torch.int64)
    x = flow.draw_noise(SEED, torch.tensor(0), torch.tensor([CLIP]), zero, shape, Purpose.SAMPLING)
    null = {name: torch.zeros_like(value) for name, value in texts().items()} | {MASK: torch.ones_like(texts()[MASK])}
    with torch.no_grad():
        for now, after in pairwise(linear_quadratic(STEPS)):
            t = torch.tensor([now], dtype=torch.float64)
            said, weight = torch.zeros_like(x), torch.zeros(windows.frames, dtype=torch.float64)
            for number, start in enumerate(windows.starts):
                here = slice(start, start + windows.length)
                given = dict(conditions(windows)(number))
                v = model(x[:, :, here], t, given)
                if guidance != 1.0:
                    bare = model(x[:, :, here], t, given | null)
                    v = bare + guidance * (v - bare)
                for frame in range(windows.length):
                    triangle = 1 + min(frame, windows.length - 1 - frame)
                    said[:, :, start + frame] += triangle * v[:, :, frame]
                    weight[start + frame] += triangle
            x = x + (after - now) * said / weight[:, None, None]
    return x[0]


def on_rank(plan: Plan, guidance: float) -> Tensor:
    return made(plan, mesh=Mesh(plan), guidance=guidance)


@pytest.mark.parametrize(
    "text", ["tp=1", "dp_shard=2", "tp=2,cp=2,dp_shard=2", "dp_replicate=2,dp_shard=2,cp=2",
             "tp=2,dp_shard=4,order=dp_shard:tp:cp:dp_replicate"]
)  # fmt: skip
def test_any_plan_makes_the_clip_of_the_oracle(pool: Pool, text: str) -> None:
    """Three windows on one, two or four data ranks: rounds, repeats, and ranks in another order. All ranks have it."""
    plan, guidance = Plan.parse(text, dtype="float64"), 2.0
    wanted = blended_on_reference(WINDOWS, full(parameters(TINY), probe_values(0), torch.float64), guidance)
    got = pool.run(plan.world_size, on_rank, plan, guidance) if plan.world_size > 1 else [made(plan, guidance=guidance)]
    assert all(torch.equal(one, got[0]) for one in got), "the overlaps agree on every rank"
    assert (got[0] - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    if plan.tp == plan.cp == 1:
        assert torch.equal(got[0], made(PLAIN, guidance=guidance)), "data ranks change no bit"


def test_after_every_step_there_is_one_latent_of_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two windows see of a frame they share is the same at every velocity they are asked for."""
    seen: list[tuple[float, Tensor]] = []
    ask = Sampler.velocity_at

    def noted(sampler: Sampler, x: Tensor, t: float, given: Batch) -> Tensor:
        seen.append((t, x.clone()))
        return ask(sampler, x, t, given)

    monkeypatch.setattr(Sampler, "velocity_at", noted)
    made(PLAIN)
    row, count = SIDE * SIDE // 4, len(WINDOWS.starts)
    assert len(seen) == STEPS * count
    for step in range(STEPS):
        asked = seen[step * count : step * count + count]
        assert len({t for t, _ in asked}) == 1
        for (a, (_, before)), (b, (_, after)) in pairwise(zip(WINDOWS.starts, asked, strict=True)):
            shared = WINDOWS.length - (b - a)
            assert shared > 0 and torch.equal(before[-shared * row :], after[: shared * row])


def seam(windows: OverlappingWindows, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of a model whose every window wants the same slow drift, and an offset of its own for every element.

    How much frames change where a window ends and another goes on, or where they overlap, over what they change within.
    """
    row, channels = SIDE * SIDE // 4, TINY.channels * 4
    generator = torch.Generator().manual_seed(6)
    drift = 0.2 * torch.arange(windows.frames, dtype=torch.float64).repeat_interleave(row)[:, None, None]
    wanted = [
        drift[start * row : (start + windows.length) * row]
        + 0.3 * torch.randn(row, 1, channels, generator=generator, dtype=torch.float64).repeat(windows.length, 1, 1)
        for start in windows.starts
    ]
    asked = [0]

    def straight_there(sampler: Sampler, x: Tensor, t: float, given: Batch) -> Tensor:
        target = wanted[asked[0] % len(wanted)]
        asked[0] += 1
        return (target - x) / (1 - t)

    monkeypatch.setattr(Sampler, "velocity_at", straight_there)
    clip = made(PLAIN, windows)
    change = (clip[:, 1:] - clip[:, :-1]).abs().mean((0, 2, 3))  # from frame i to frame i + 1
    ends = {start + windows.length for start in windows.starts[:-1]}
    begins = set(windows.starts[1:])
    inside = [any(begin <= i + 1 < end + 1 for begin, end in zip(sorted(begins), sorted(ends), strict=True))
              for i in range(windows.frames - 1)]  # fmt: skip
    border = torch.tensor(inside)
    return float(change[border].mean() / change[~border].mean())


def test_seams_that_are_blended_change_as_frames_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 14 that overlap by 4, as the paper's; beside them some that only meet."""
    blended, met = OverlappingWindows(34, 14, 4), OverlappingWindows(42, 14, 0)
    assert blended.starts == (0, 10, 20) and met.starts == (0, 14, 28)
    assert seam(blended, monkeypatch) <= 1.1
    assert seam(met, monkeypatch) > 1.5


def test_windows_of_another_start_are_found() -> None:
    """The proof above fails where a window looks one frame off its place."""
    wanted = blended_on_reference(WINDOWS, full(parameters(TINY), probe_values(0), torch.float64), 1.0)
    moved = OverlappingWindows(FRAMES, 5, 2)
    moved.__dict__["starts"] = (0, 2, 6)
    assert (made(PLAIN, moved) - wanted).abs().max() > 1e-3


def test_patches_of_several_frames_are_refused() -> None:
    deep: ModelConfig = replace(TINY, patch=(2, 2, 2))
    plan = PLAIN
    units = unit_layout(deep, plan)
    master = torch.zeros(1, units.flat_elements, dtype=torch.float64)
    sampler = Sampler(deep, plan, BatchShape(1, (4, SIDE, SIDE)), None, master, guidance=1.0)
    with pytest.raises(CinemeshError, match="its tokens are of 2 frames"):
        WindowedSampler(sampler, OverlappingWindows(8, 4, 2))
