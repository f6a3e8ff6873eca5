"""The scratch that the planner reserves is what the launchers take, and partial sums stay a small part of the bytes."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from torch import Tensor

from cinemesh.kernels.catalogue import IMPLEMENTATIONS, Implementation
from cinemesh.kernels.compile import triton_modules
from cinemesh.kernels.ops import OPS
from cinemesh.kernels.spec import Sizes, Spec
from cinemesh.kernels.tiles import gate_slices, norm_slices

from .counting import operands_of
from .examples import EXAMPLES
from .test_ops import call

pytestmark = pytest.mark.usefixtures("where_kernels_run")

TRITON = [entry for entry in IMPLEMENTATIONS if entry.package == "triton" and not OPS[entry.op].is_product]


@pytest.mark.parametrize("entry", TRITON, ids=lambda entry: entry.op)
@pytest.mark.parametrize("shape", [(1, 1, 5), (100, 2, 7), (300, 1, 3)], ids=str)
def test_declared_scratch_is_what_is_taken(
    entry: Implementation, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every op that Triton runs: one that takes some and is listed with none would overrun the arena."""
    taken = [0]

    def counted(like: Tensor, *shape: int) -> Tensor:
        out = torch.empty(shape)
        taken.append(out.numel() * out.element_size())
        return out

    module = import_module(f"cinemesh.kernels.{entry.module}")
    monkeypatch.setattr(module, "scratch", counted, raising=False)
    torch.manual_seed(1)
    example = next(EXAMPLES[entry.op](*shape))
    inputs, outputs, attrs = call(entry.op, example)
    sizes = operands_of(entry.op, inputs, outputs, attrs).sizes
    getattr(module, entry.function)(inputs, outputs, **attrs)
    rows = sizes.get("l", 0) * sizes["b"] if "b" in sizes else 0
    in_one_pass = entry.op == "layer_norm_backward" and rows < 96  # too few rows for partial sums
    assert sum(taken) == (0 if in_one_pass else entry.workspace(sizes, 2))


@pytest.mark.parametrize("ranks", (1, 2, 4, 8, 16))
def test_partial_sums_are_below_a_twentieth_of_what_the_op_moves(ranks: int) -> None:
    """73,728 tokens in bf16 over tp * cp ranks; partial sums are written and read, vectors read once a program."""
    tokens = 73728 // ranks
    for onto, bytes_a_token in ((False, 6), (True, 8)):
        assert (16 + 4) * norm_slices(tokens, 1) <= 0.05 * bytes_a_token * tokens, onto
    assert (8 + 2) * gate_slices(tokens) <= 0.05 * 6 * tokens


SIZES = Sizes(
    **{"tokens": 96, "batch": 2, "width": 32, "heads": 4, "head_dim": 16, "ffn": 64, "tp": 2, "cp": 2},
    **{"text_tokens": (5, 3), "text_widths": (24, 16), "latent": (4, 6, 8, 8), "patch": (1, 2, 2)},
    shard_elements=4096,
)
SPECS = [
    spec
    for module in triton_modules()
    for spec in import_module(f"cinemesh.kernels.{module}").compile_specs(SIZES)
    if spec.memory_bound
]
ITEM_BYTES = {"*bf16": 2, "*fp32": 4, "*i64": 8, "*i1": 1}
UPDATED = {"master": 2, "exp_avg": 2, "exp_avg_sq": 2, "ema": 2, "counters": 1 / 2}  # of two counters, one is read
# How often an argument must be read or written, where that is not once.
TIMES: dict[str, dict[str, float]] = {
    "adamw.update": {**UPDATED, "copy": 0},  # stands for none
    "adamw.update_with_copy": UPDATED,
    "gated_residual.backward": {"gate_sums": 1 / 3},  # of three programs, one would do
    "modulate_norm.forward": {"position": 0, "x0": 0},  # stand for none
    "modulate_norm.backward": {"dx": 2, "shift_sums": 0, "product_sums": 0},  # adds to dx; sums: none with one program
    "noise.draw": {"counters": 1 / 2},
    "patches.patchify": {"latent": 1 / 4},  # of four ranks, one's
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{'-'.join(map(str, spec.shape.values()))}")
def test_the_least_bytes_are_those_of_the_arguments(spec: Spec) -> None:
    """Small terms too: the compile check, at the shapes of the 30B, could not see them."""
    times = TIMES.get(spec.name, {})
    least = 0.0
    for name, kinds in spec.signature.items():
        for kind in (kinds,) if isinstance(kinds, str) else kinds:
            if kind.startswith("*"):
                shape = spec.arguments[name]
                assert isinstance(shape, tuple)
                least += times.get(name, 1) * ITEM_BYTES[kind] * math.prod(shape)
    assert spec.least_bytes == pytest.approx(least, rel=1e-12) and spec.least_bytes > 0


# Of SIZES: 48 rows of two samples where a rank holds tokens, 24 by token; each size rounded up to a power of two.
ATTENTION = {
    f"{op}{part}": f"E2,K16,S{keys},T64"
    for op, keys in (("attention", 128), ("cross_attention", 8))
    for part in (".forward", "_backward.queries", "_backward.keys")
}
BY_TOKEN = ("gated_residual.forward", "gated_residual.backward", "modulate_norm.forward", "modulate_norm.backward")
SHAPES = {
    **{name: {shape} for name, shape in ATTENTION.items()},
    **{key: {"D32,T64"} for key in (*BY_TOKEN, "modulate_norm.position_forward")},
    **{key: {"D32,L16"} for key in ("layer_norm.forward", "layer_norm.backward")},
    **{key: {"N4096"} for key in ("swiglu.forward", "swiglu.backward", "adamw.update")},
    "merge.attention": {"K16,N4,T128", "K16,N16,T128"},
    "merge.sum": {"E4096,N4", "E4096,N16"},
}


def test_a_tuned_tile_is_looked_up_by_the_shape_of_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another shape the tile that was measured is never found, and nothing says so."""
    asked: dict[str, set[str]] = {}

    def noted(kernel: str, shape: str, default: dict[str, int], *_: str) -> dict[str, int]:
        asked.setdefault(kernel, set()).add(shape)
        return dict(default)

    modules = [import_module(f"cinemesh.kernels.{name}") for name in triton_modules()]
    for module in modules:
        monkeypatch.setattr(module, "tile", noted, raising=False)
    for module in modules:
        module.compile_specs(SIZES)
    assert asked == SHAPES
