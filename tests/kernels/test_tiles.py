"""The scratch that the planner reserves is what the launchers take, and partial sums stay a small part of the bytes."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from cinemesh.kernels.catalogue import IMPLEMENTATIONS, Implementation
from cinemesh.kernels.ops import OPS
from cinemesh.kernels.tiles import gate_slices, norm_slices

from .counting import operands_of
from .examples import EXAMPLES
from .test_ops import call

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
