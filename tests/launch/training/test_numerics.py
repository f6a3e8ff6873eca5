"""What a watched step says of its values: the reference's numbers under every plan, and where they first went bad."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BATCH, TINY, batch_of, plan_of
from harness import Pool
from torch import Tensor
from training import start

from cinemesh.launch.training import numerics
from cinemesh.launch.training.numerics import (
    NUMERICS_FILE,
    Magnitude,
    Numerics,
    RankNumbers,
    StepNumbers,
    combined,
    gathered,
    measure_into,
)
from cinemesh.model import reference as specification
from cinemesh.model.config import parameters
from cinemesh.model.inputs import IDS, LATENTS, MASK, PLACES, BatchShape, training_inputs
from cinemesh.model.reference import Reference, training_loss
from cinemesh.model.runner import StepRunner, data_share
from cinemesh.model.step import Optimizer, unit_layout
from cinemesh.model.weights import full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh, coordinates

SAMPLES = 4  # of the global batch
PLANS = ["", "tp=2,dp_shard=2,tp_slices=2", "cp=2,dp_replicate=2,kv_slices=2", "tp=3,micro_batches=2,recompute=none"]
PLANS += ["cp=2,kv_chunks=2,grad_units=2,prefetch=2", "recompute=none,offload=act:o,micro_batches=2"]


def batch() -> dict[str, Tensor]:
    """Of four samples that differ."""
    one = batch_of()
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((SAMPLES, *one[LATENTS].shape[1:]), generator=generator, dtype=torch.float64)
    places = torch.arange(SAMPLES)
    whole = {name: value.expand(-1, SAMPLES, -1) for name, value in one.items() if name.startswith("text.")}
    return whole | {LATENTS: latents, IDS: 30 + places, PLACES: places, MASK: one[MASK].expand(SAMPLES, -1)}


def runner_of(plan: Plan, mesh: Mesh | None) -> StepRunner:
    samples = SAMPLES // plan.data_ranks // plan.micro_batches
    runner = StepRunner(TINY, plan, BatchShape(samples, BATCH.latent), Optimizer(), mesh, caption_dropout=0.0)
    runner.initialise(probe_values(0))
    inputs = training_inputs(TINY, plan, runner.batch)
    share = SAMPLES // plan.micro_batches
    at = coordinates(plan, 0) if mesh is None else mesh.coordinates
    for micro_batch in range(plan.micro_batches):
        first = micro_batch * share
        part = {
            n: v[:, first : first + share] if n.startswith("text.") else v[first : first + share]
            for n, v in batch().items()
        }
        runner.load(micro_batch, data_share(part, inputs, plan, at))
    return runner


def watched(plan: Plan, planted: str | None = None) -> tuple[StepNumbers | None, list[float], list[float]]:
    """The report, and loss and gradient norm of a step that was watched and of one that was not."""
    mesh = Mesh(plan) if plan.world_size > 1 else None
    ends: list[list[float]] = []
    report = None
    for watch in (False, True):
        runner = runner_of(plan, mesh)
        if planted is not None:
            plant(runner, planted)
        seen = Numerics(runner) if watch else None
        runner.executor.arena.fill_(0xFF)  # NaN in any dtype: what no record has written is no finding
        runner.step(1e-3, seen.watch if seen else None)
        ends.append([runner.loss.item(), runner.gradient_norm.item()])
        if seen:
            report = gathered(seen.measured(), runner)
    return report, ends[0], ends[1]


def plant(runner: StepRunner, name: str) -> None:
    """One head's weights that overflow in a product: of the last head."""
    values = probe_values(0)

    def huge(row: Any, block: Tensor) -> Tensor:
        made = values(row, block)
        if row.name == name:
            index = 4 * block[..., None] + torch.arange(4)
            heads, dim = row.shape[-2:]
            made = torch.where((index // dim) % heads == heads - 1, 1e308, made)
        return made

    runner.initialise(huge)


def reference() -> tuple[list[Tensor], dict[str, Tensor], Reference]:
    """What each block hands on, and gradients by parameter: by autograd, on one process."""
    model = Reference(TINY).double()
    model.load_state_dict(full(parameters(TINY), probe_values(0), torch.float64))
    made: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: made.append(out.detach()))
    training_loss(model, batch(), 0, 0, caption_dropout=0.0).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return made, gradients, model


@pytest.mark.parametrize("text", PLANS)
def test_the_numbers_are_the_references(pool: Pool, text: str) -> None:
    """In float64, whatever the plan splits, slices, sums or makes again; and a watched step is the same step."""
    plan = plan_of(text)
    report, plain, seen = pool.run(plan.world_size, watched, plan)[0] if plan.world_size > 1 else watched(plan)
    assert plain == seen and math.isfinite(plain[0])
    assert report is not None and report.bad is None
    made, gradients, _ = reference()
    for block, want in enumerate(made):
        assert report.residual[block].elements == want.numel()
        assert report.residual[block].amax == pytest.approx(float(want.abs().max()), rel=1e-10)
        assert report.residual[block].rms == pytest.approx(float(want.square().mean().sqrt()), rel=1e-10)
    for unit in unit_layout(TINY, plan).units:
        of = [gradients[slot.parameter.name] for slot in unit.slots]
        found = report.gradient[unit.name]
        assert found.amax == pytest.approx(max(float(g.abs().max()) for g in of), rel=1e-8), unit.name
        assert found.squares == pytest.approx(sum(float(g.square().sum()) for g in of), rel=1e-8), unit.name


def test_no_logit_is_above_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scores made from the reference's own q and k, which the bound must hold within a factor of head dim."""
    report, _, _ = watched(plan_of(""))
    assert report is not None
    model = reference()[2]
    scores: list[float] = []
    plain = specification.attention

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            scores.append(float(torch.einsum("sbhk,nbhk->bhsn", q, k).detach().abs().max()) / math.sqrt(q.shape[-1]))
        return plain(q, k, v, mask)

    monkeypatch.setattr(specification, "attention", noted)
    training_loss(model, batch(), 0, 0, caption_dropout=0.0)
    for block, score in enumerate(scores):
        assert score <= report.logits[block] <= TINY.head_dim * score * 3, block


@pytest.mark.parametrize(
    ("text", "ranks"), [("", {0}), ("tp=2,dp_shard=2", {1, 3}), ("tp=3,order=dp_shard:tp:cp:dp_replicate", {2})]
)
def test_one_head_that_overflows_is_named(pool: Pool, text: str, ranks: set[int]) -> None:
    """Its block, its product, and the rank that has the last head; everything behind it is bad too, everywhere."""
    plan = plan_of(text)
    answers = (
        pool.run(plan.world_size, watched, plan, "blocks.1.q") if plan.world_size > 1 else [watched(plan, "blocks.1.q")]
    )
    report = answers[0][0]
    assert report is not None and report.bad is not None
    assert all(answer[0] is None for answer in answers[1:])
    bad = report.bad
    assert report.bad.rank == min(ranks)
    assert bad.bad.record.startswith("mb0/blocks.1.forward/q") and bad.bad.kind == "matmul"
    assert 0 < bad.bad.count <= bad.bad.elements / (TINY.heads // plan.tp)
    line = bad.line(plan, [30, 31, 32, 33])
    mine = [30, 31, 32, 33][: SAMPLES // plan.data_ranks]
    assert f"on rank {min(ranks)} (" in line and line.endswith(f"samples {mine}"), line


def test_samples_are_those_of_the_rank_and_the_micro_batch() -> None:
    """Data rank 1 of 2 has the second half of a micro-batch."""
    plan = plan_of("dp_shard=2,micro_batches=2")
    report, _, _ = watched(plan_of(""), "blocks.1.q")
    assert report is not None and report.bad is not None
    later = replace(
        report.bad, coordinates=report.bad.coordinates | {"dp_shard": 1}, bad=replace(report.bad.bad, micro_batch=1)
    )
    assert later.line(plan, list(range(8))).endswith("samples [6, 7]")
    assert replace(later, bad=replace(later.bad, micro_batch=None)).line(plan, [5, 6]).endswith("samples [5, 6]")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parts_are_measured_as_a_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In more than two parts, with infinities and NaN among them; a scalar and nothing at all too."""
    value = torch.linspace(-3, 2, 7 * 11, dtype=torch.float64).view(7, 11).to(dtype)
    value[2, 3], value[6, 0] = math.inf, math.nan
    finite = value[value.isfinite()].double()
    monkeypatch.setattr(numerics, "PART_ELEMENTS", 25)
    for given, want in (
        (value, [float(finite.abs().max()), float(finite.square().sum()), 2.0]),
        (value.T, [float(finite.abs().max()), float(finite.square().sum()), 2.0]),
        (torch.tensor(-2.0, dtype=dtype), [2.0, 4.0, 0.0]),
        (value[:0], [0.0, 0.0, 0.0]),
    ):
        row = torch.full((3,), 9.0, dtype=torch.float64)
        measure_into(given, row)
        assert row.tolist() == pytest.approx(want, rel=1e-6 if dtype != torch.float64 else 1e-12)


def test_replicas_are_counted_once() -> None:
    """Their gradients are the same; their activations are of other samples."""
    part = RankNumbers([Magnitude(1.0, 4.0, 4)], [2.0], [3.0], {"u": Magnitude(5.0, 25.0, 1)}, None)
    report = combined([(part, {"dp_replicate": 0}), (part, {"dp_replicate": 1})], head_dim=16)
    assert (report.residual[0].elements, report.gradient["u"].elements) == (8, 1)
    assert report.residual[0].rms == 1.0 and report.logits == [2.0 * 3.0 * 4.0]


def test_a_run_says_them(values: dict[str, Any], tmp_path: Path) -> None:
    """Every second step, in a file, a chart and the log; the weights are those of a run that measured nothing."""
    values["logging"] |= {"numerics_every": 2}
    assert start(values, tmp_path) == 0
    run = Path(values["logging"]["directory"])
    lines = [json.loads(line) for line in (run / NUMERICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, values["schedule"]["steps"] + 1, 2))
    assert all(line["bad"] is None and line["residual"][0]["amax"] > line["residual"][0]["rms"] > 0 for line in lines)
    assert "largest: residual" in (run / "train.log").read_text()
