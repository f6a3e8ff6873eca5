"""The block of the ablation: DiT's norms, biases and SiLU, in every reader of a model, against NumPy.

Only this sees a variant that program and reference share an error of, and a bias whose gradient tp sums twice.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Pool
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.kernels.ops import OPS
from cinemesh.launch.cli import app
from cinemesh.launch.proof.bounds import FLOAT64_BOUND
from cinemesh.launch.proof.lint import lint
from cinemesh.launch.proof.parity import Case
from cinemesh.launch.proof.verify import Report, small_case, verify_on_rank
from cinemesh.model.config import ModelConfig, parameters, preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.lora import Lora
from cinemesh.model.reference import Block
from cinemesh.model.step import build_step
from cinemesh.model.weights import full, probe_values
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare

PLANS = (
    "recompute=full,micro_batches=2",
    "tp=2,cp=2,dp_shard=2",
    "tp=2,cp=2,kv_slices=3,tp_slices=3,recompute=q:kv:o:lse:up",
    "cp=2,dp_shard=2,kv_chunks=3,grad_units=2,micro_batches=2,prefetch=2",
    "tp=2,dp_replicate=2,fused_tp=true,defer_weight_gradients=true",
)
DIT = "preset: movie-gen-5b\nblock: dit\nffn: 12288\n"


def dit(text: str) -> Case:
    case = small_case(Plan.parse(text, dtype="float64"), "tiny")
    return replace(case, config=replace(case.config, block="dit"))


def reported(case: Case) -> Report | None:
    return verify_on_rank(case)


@pytest.mark.parametrize("text", PLANS)
def test_under_a_plan_its_step_is_the_reference(pool: Pool, text: str) -> None:
    case = dit(text)
    report = pool.run(case.plan.world_size, reported, case)[0]
    assert report is not None and report.ok, report
    assert max(report.worst.values()) <= FLOAT64_BOUND


def test_factors_beside_its_products(pool: Pool) -> None:
    """Biases are frozen with the weights; only a gate cannot have factors."""
    case = dit("tp=2,cp=2")
    targets = ("q", "kv", "o", "cross.q", "cross.kv", "cross.o", "up", "down")
    case = replace(case, config=replace(case.config, lora=Lora(4, 6.0, targets)))
    report = pool.run(case.plan.world_size, reported, case)[0]
    assert report is not None and report.ok, report
    with pytest.raises(CinemeshError, match=r"lora\.targets name gate, and a block of form dit has none"):
        replace(case.config, lora=Lora(4, 6.0))


# -- against NumPy ----------------------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    scores = np.einsum("sbhk,nbhk->bhsn", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
    return np.einsum("bhsn,nbhk->sbhk", softmax(scores), v)


def layer_norm(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def numpy_block(w: dict[str, np.ndarray], x: np.ndarray, position: np.ndarray, rows: np.ndarray, text: np.ndarray,
                mask: np.ndarray) -> np.ndarray:  # fmt: skip
    """DiT's block with cross-attention between its halves, position and modulation as the backbone has them."""
    shift1, scale1, gate1, shift2, scale2, gate2 = rows + w["table"][:, None, :]
    x = x + position[:, None, :]
    h = layer_norm(x, 1e-6) * (1 + scale1) + shift1
    q = np.einsum("sbd,dhk->sbhk", h, w["q"]) + w["q_bias"]
    k, v = np.einsum("sbd,dchk->csbhk", h, w["kv"]) + w["kv_bias"][:, None, None]
    x = x + gate1 * (np.einsum("sbhk,hkd->sbd", attend(q, k, v), w["o"]) + w["o_bias"])
    q = np.einsum("sbd,dhk->sbhk", x, w["cross.q"]) + w["cross.q_bias"]
    k, v = np.einsum("lbd,dchk->clbhk", text, w["cross.kv"]) + w["cross.kv_bias"][:, None, None]
    x = x + np.einsum("sbhk,hkd->sbd", attend(q, k, v, mask), w["cross.o"]) + w["cross.o_bias"]
    h = layer_norm(x, 1e-6) * (1 + scale2) + shift2
    return x + gate2 * (silu(h @ w["up"] + w["up_bias"]) @ w["down"] + w["down_bias"])


def test_the_reference_is_dits_block() -> None:
    config = replace(preset("tiny"), block="dit", layers=1)
    weights = full(parameters(config), probe_values(3), torch.float64)
    own = {name.removeprefix("blocks.0."): value for name, value in weights.items() if name.startswith("blocks.0.")}
    block = Block(config).double()
    block.load_state_dict(own)
    torch.manual_seed(0)
    tokens, samples, texts, d = 5, 3, 4, config.width
    given = [
        torch.randn(shape, dtype=torch.float64)
        for shape in ((tokens, samples, d), (tokens, d), (6, samples, d), (texts, samples, d))
    ]
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
    got = block(*given, mask).detach().numpy()

    def written_out(weights: dict[str, np.ndarray]) -> np.ndarray:
        x, position, rows, text = (value.numpy() for value in given)
        return numpy_block(weights, x, position, rows, text, mask.numpy())

    wanted = written_out({n: v.numpy() for n, v in own.items()})
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())
    biases = [name for name in own if name.endswith("_bias")]
    assert len(biases) == 8
    for name in biases:
        less = {n: v.numpy() * (n != name) for n, v in own.items()}
        moved = np.abs(written_out(less) - wanted).max()
        # A bias of all keys alike adds as much to every score of a query, which a softmax does not see: half of kv's.
        assert moved > 1e-4 * np.abs(wanted).max(), name


# -- as a model of every command --------------------------------------------------------------------------------------


def model_file(tmp_path: Path, text: str = DIT) -> str:
    path = tmp_path / "dit.yaml"
    path.write_text(text)
    return str(path)


def test_its_products_have_as_many_weights() -> None:
    def of(config: ModelConfig, part: str) -> int:
        return sum(row.elements for row in parameters(config) if row.part == part)

    backbone = preset("movie-gen-5b")
    other = replace(backbone, block="dit", ffn=12288)
    for part in ("FFN", "self-attention", "cross-attention", "shared adaLN"):
        assert of(backbone, part) == of(other, part) > 0
    assert of(backbone, "biases") == of(other, "norm gains") == 0
    d, f = other.width, other.ffn
    assert of(other, "biases") == 32 * (2 * (3 * d + d) + f + d)


def test_it_is_linted(tmp_path: Path) -> None:
    assert lint(Plan.parse("tp=2,cp=2,dp_shard=2"), model_file(tmp_path)) == []


def product_flops(config: ModelConfig, plan: Plan) -> int:
    """Of matrix products and attention, in a step."""
    program = build_step(config, plan, BatchShape(1, (16, 24, 44)))
    found = [(OPS[op.kind], program.operands(op)) for op in program.ops if op.kind in OPS]
    return sum(spec.flops_of(operands) for spec, operands in found if spec.is_product)


@pytest.mark.slow
def test_it_is_planned_and_priced(tmp_path: Path) -> None:
    """As much work in products; norms and biases without kernels of their own make its step longer."""
    path, backbone = model_file(tmp_path), replace(preset("movie-gen-5b"), layers=2)
    plan = Plan.parse("tp=2,cp=2")
    assert product_flops(backbone, plan) == product_flops(replace(backbone, block="dit", ffn=12288), plan)
    steps: list[float] = []
    for model in ("movie-gen-5b", path):
        done = CliRunner().invoke(app, ["plan", "--gpus", "64", "--model", model, "--latent", "16x24x44", "--json"])
        assert done.exit_code == 0, done.output
        steps.append(json.loads(done.stdout)["plans"][0]["step_s"])
    assert 1 < steps[1] / steps[0] < 1.4


def test_a_plan_may_keep_what_it_has() -> None:
    case = dit("recompute=up:o:lse")
    prepare(build_step(case.config, case.plan, case.batch), backend="gloo")
    case = dit("recompute=gate:o")
    with pytest.raises(CinemeshError, match=r"recompute keeps \['gate'\], which no block has"):
        prepare(build_step(case.config, case.plan, case.batch), backend="gloo")


def test_another_form_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match="block is 'dti'") as error:
        small_case(Plan(), model_file(tmp_path, "preset: tiny\nblock: dti\n"))
    assert "dit" in str(error.value.remedy)
