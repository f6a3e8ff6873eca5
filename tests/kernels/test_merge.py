"""Triton's merge of attention over parts of the keys, and its sum of parts, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.kernels import merge as kernels
from cinemesh.kernels.reference import REFERENCE
from cinemesh.launch.commands.calls import calls_of, tensors
from cinemesh.model.config import Encoder, ModelConfig
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.passes.pipeline import prepare

from .against_float64 import BOUND, DTYPES, check, poisoned, rand, relative_error

pytestmark = pytest.mark.usefixtures("where_kernels_run")

SHAPES = [(1, 1, 1, 5), (33, 3, 2, 24), (70, 2, 3, 64), (129, 1, 1, 128)]  # tokens, samples, heads, head dim
"""Their last programs, of 16 tokens, hold 1, 1, 6 and 1."""
COUNTS = (1, 2, 5, 16)


def signature(count: int, part: str, whole: str) -> dict[str, str]:
    return {"signature": ",".join([part] * count) + "->" + whole}


def parts(count: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """o and log-sum-exp in turn; the latter of many orders of magnitude, as of keys that some queries do not match."""
    t, b, h, _ = shape
    return [x for _ in range(count) for x in (rand(*shape, dtype=dtype), 5 * rand(b, h, t))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge(shape: tuple[int, int, int, int], count: int, dtype: torch.dtype) -> None:
    given = parts(count, shape, dtype)
    check("merge_attention", kernels.merge_attention, given, given[:2], signature(count, "tbhk,bht", "tbhk,bht"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", [*SHAPES, (61, 1, 2, 40)])
def test_sum(shape: tuple[int, int, int, int], count: int, dtype: torch.dtype) -> None:
    """In fp32 bit for bit the reference, which adds in the same order; the last shape takes two programs."""
    given = parts(count, shape, dtype)[0::2]
    exact = dtype == torch.float32
    check("sum_parts", kernels.sum_parts, given, given[:1], signature(count, "tbhk", "tbhk"), exact=exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_without_keys_counts_for_nothing(dtype: torch.dtype) -> None:
    """Its o may be NaN, as a softmax over nothing is; a row that no part has keys for is zero, not NaN."""
    given = parts(3, (40, 2, 2, 16), dtype)
    first, second = given[2:4], given[4:6]
    given[0].fill_(math.nan)
    given[1].fill_(-math.inf)
    check("merge_attention", kernels.merge_attention, given, given[:2], signature(3, "tbhk,bht", "tbhk,bht"))
    log = torch.logaddexp(first[1].double(), second[1].double())
    share = (first[1].double() - log).exp().permute(2, 0, 1)[..., None]
    want = share * first[0].double() + (1 - share) * second[0].double()
    for part, part_log in (first, second):
        part[5], part_log[..., 5] = math.nan, -math.inf
    for merge in (kernels.merge_attention, REFERENCE["merge_attention"]):
        o, lse = poisoned(first[0]), poisoned(first[1])
        merge(given, [o, lse], **signature(3, "tbhk,bht", "tbhk,bht"))
        assert o[5].eq(0).all() and lse[..., 5].eq(-math.inf).all()
        rest = torch.arange(40) != 5
        assert relative_error(o[rest], want[rest]) <= BOUND[dtype]
        assert relative_error(lse[..., rest], log[..., rest]) <= BOUND[torch.float32]


def test_log_sum_exps_of_any_size_are_merged() -> None:
    """Nothing overflows: exp(200) is no fp32 number."""
    shape = (9, 1, 2, 16)
    for offset in (-1e4, 200.0, 1e4):
        given = parts(4, shape, torch.float32)
        given[1::2] = [x + offset for x in given[1::2]]
        check("merge_attention", kernels.merge_attention, given, given[:2], signature(4, "tbhk,bht", "tbhk,bht"))


def test_a_nan_is_not_hidden() -> None:
    """Only a part without keys may hold one; of an attention that broke, the step must see it."""
    given = parts(3, (4, 1, 1, 8), torch.float32)
    given[2][1, 0, 0, 3], given[3][0, 0, 2] = math.nan, math.nan
    o, lse = torch.empty_like(given[0]), torch.empty_like(given[1])
    kernels.merge_attention(given, [o, lse], **signature(3, "tbhk,bht", "tbhk,bht"))
    assert o.isnan()[:, 0, 0].nonzero().tolist() == [[1, 3], *([2, k] for k in range(8))]
    assert lse.isnan()[0, 0].tolist() == [False, False, True, False]


def test_the_calls_of_a_step() -> None:
    """With the tensors and attributes that a program of token chunks makes, of both dtypes that Triton takes."""
    config = ModelConfig("one-block", 1, 128, 2, 40, (Encoder("a", 24, 3),), channels=4)
    for dtype in ("float32", "bf16"):
        plan = Plan.parse("cp=2,kv_chunks=3", dtype=dtype)
        calls = calls_of(prepare(build_step(config, plan, BatchShape(1, (1, 4, 6))), backend="nccl"))
        found = {call.op: call for call in calls if call.op in ("merge_attention", "sum_parts")}
        assert len(found) == 2
        for op, call in found.items():
            (inputs, got), (_, want) = (tensors(call, str(torch.get_default_device())) for _ in range(2))
            getattr(kernels, op)(inputs, got, **call.attrs)
            REFERENCE[op](inputs, want, **call.attrs)
            for x, y in zip(got, want, strict=True):
                assert relative_error(x, y) <= BOUND[x.dtype]


def test_bad_input_is_named() -> None:
    given = parts(2, (4, 1, 2, 16), torch.float32)
    o, lse = given[:2]
    merged = signature(2, "tbhk,bht", "tbhk,bht")
    with pytest.raises(CinemeshError, match="merge_attention: o of part 1: got 3 heads, wanted 2 as in o"):
        kernels.merge_attention([*given[:2], rand(4, 1, 3, 16), lse], [o, lse], **merged)
    with pytest.raises(CinemeshError, match="merge_attention: lse of part 1: got dtype bfloat16, wanted float32"):
        kernels.merge_attention([*given[:3], lse.bfloat16()], [o, lse], **merged)
    with pytest.raises(CinemeshError, match=r"sum_parts: addend 1: got strides .*, wanted a contiguous tensor"):
        kernels.sum_parts([o, rand(4, 1, 2, 32)[..., ::2]], [o], **signature(2, "tbhk", "tbhk"))
