"""Triton's attention against the float64 reference, forward and backward, and as machine code for an H100."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.kernels.attention import attention, cross_attention
from cinemesh.kernels.attention_backward import attention_backward, cross_attention_backward
from cinemesh.kernels.reference import REFERENCE

from .against_float64 import poisoned

pytestmark = pytest.mark.usefixtures("where_kernels_run")

BOUND = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
DTYPES = tuple(BOUND)
# Queries, keys, samples, heads, head dim: ragged both ways, one row, one key, and whole blocks of every tile.
SHAPES = [
    (5, 123, 2, 3, 64),
    (123, 5, 1, 2, 128),
    (129, 123, 2, 1, 128),
    (1, 129, 1, 3, 64),
    (7, 1, 2, 2, 128),
    (128, 128, 1, 1, 128),
]
# Where queries see one key, dq cancels to 0: what is left is rounding of do v^T / sqrt(K), which is of order 1.
LEAST_SCALE = 1.0
# Weights of keys that are not there may overflow before they are dropped; NumPy, which interprets, says so.
PADDING = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def key_mask(samples: int, keys: int) -> Tensor:
    """The first sample sees its last key alone."""
    mask = torch.rand(samples, keys) > 0.5
    mask[:, keys // 2] = True
    mask[0] = False
    mask[0, -1] = True
    return mask


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() if x.dtype.is_floating_point else x for x in tensors]


def run(op: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Our kernel on poisoned outputs, twice."""
    kernels = (attention, cross_attention, attention_backward, cross_attention_backward)
    kernel = {kernel.__name__: kernel for kernel in kernels}[op.removeprefix("cross_")]
    first, second = ([poisoned(x) for x in outputs] for _ in range(2))
    kernel(inputs, first)
    kernel(inputs, second)
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(x, y), f"{op}: output {i} differs between two runs"
    return first


def truth(op: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    found = [poisoned(x.double()) for x in outputs]
    REFERENCE[op](wide(inputs), found)
    return found


def close(name: str, got: Tensor, want: Tensor, bound: float = 0.0) -> None:
    error = (got.double() - want).abs().max().item() / max(want.abs().max().item(), LEAST_SCALE)
    assert error <= (bound or BOUND[got.dtype]), f"{name} {got.dtype} errs by {error:.2e}"  # and NaN fails


def problem(shape: tuple[int, int, int, int, int], dtype: torch.dtype, masked: bool) -> tuple[list[Tensor], Tensor]:
    """q, kv, [mask] and do."""
    t, s, b, h, k = shape
    q, do, kv = rand(t, b, h, k, dtype=dtype), rand(t, b, h, k, dtype=dtype), rand(s, b, 2, h, k, dtype=dtype)
    return [q, kv, key_mask(b, s)] if masked else [q, kv], do


def statistics(q: Tensor) -> Tensor:
    """Shape and dtype of the log-sum-exp."""
    return q.new_empty((q.shape[1], q.shape[2], q.shape[0]), dtype=torch.float32)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape: tuple[int, int, int, int, int], dtype: torch.dtype, masked: bool) -> None:
    inputs, do = problem(shape, dtype, masked)
    op = "cross_attention" if masked else "attention"
    outputs = [inputs[0], statistics(inputs[0])]
    o, lse = truth(op, inputs, outputs)
    for name, got, want in zip(("o", "lse"), run(op, inputs, outputs), (o, lse), strict=True):
        close(name, got, want)

    q, kv, *mask = inputs
    inputs = [do, q, kv, o.to(dtype), lse.float(), *mask]
    want, got = (how(f"{op}_backward", inputs, [q, kv]) for how in (truth, run))
    close("dq", got[0], want[0])
    close("dkv", got[1], want[1])


@pytest.mark.parametrize("masked", (False, True))
def test_slices_of_heads_in_larger_buffers(masked: bool) -> None:
    """Only here: strides that are not the shape's. Bit for bit the dense result, and nothing around it is touched."""
    dtype = torch.bfloat16
    (q, kv, *mask), do = problem((37, 70, 2, 4, 64), dtype, masked)
    op = "cross_attention" if masked else "attention"
    heads = slice(1, 3)
    dense = [q[:, :, heads].contiguous(), kv[:, :, :, heads].contiguous(), *mask]
    sliced = [q[:, :, heads], kv[:, :, :, heads], *mask]
    o, lse = run(op, dense, [dense[0], statistics(dense[0])])
    all_o, all_lse = poisoned(q), poisoned(statistics(q))
    attention(sliced, [all_o[:, :, heads], all_lse[:, heads]])
    assert torch.equal(all_o[:, :, heads], o) and torch.equal(all_lse[:, heads], lse)
    assert all_o[:, :, [0, 3]].isnan().all() and all_lse[:, [0, 3]].isnan().all()

    dq, dkv = run(f"{op}_backward", [do[:, :, heads].contiguous(), *dense[:2], o, lse, *mask], [dense[0], dense[1]])
    all_dq, all_dkv = poisoned(q), poisoned(kv)
    inputs = [do[:, :, heads], *sliced[:2], all_o[:, :, heads], all_lse[:, heads], *mask]
    attention_backward(inputs, [all_dq[:, :, heads], all_dkv[:, :, :, heads]])
    assert torch.equal(all_dq[:, :, heads], dq) and torch.equal(all_dkv[:, :, :, heads], dkv)
    assert all_dq[:, :, [0, 3]].isnan().all() and all_dkv[:, :, :, [0, 3]].isnan().all()


@PADDING
def test_padded_keys_have_no_influence() -> None:
    """Whatever finite value stands in the padding, overflowing weights included: same outputs, gradient 0."""
    (q, kv, mask), do = problem((9, 70, 2, 2, 64), torch.float32, masked=True)
    found: list[list[Tensor]] = []
    for padding in (0.0, 1e4):
        keys = torch.where(mask.t()[:, :, None, None, None], kv, padding)
        o, lse = run("cross_attention", [q, keys, mask], [q, statistics(q)])
        dq, dkv = run("cross_attention_backward", [do, q, keys, o, lse, mask], [q, kv])
        assert (dkv[~mask.t()] == 0).all()
        found.append([o, lse, dq, dkv])
    for zeros, large in zip(*found, strict=True):
        assert torch.equal(zeros, large)


@PADDING
def test_scores_of_any_size() -> None:
    """The running maximum keeps exp2 in range, whichever block of keys holds it, and far below zero too."""
    (q, kv), do = problem((5, 300, 1, 1, 64), torch.float32, masked=False)
    for shift in (-400.0, 400.0):
        q[..., 0], kv[:, :, 0, :, 0] = 8.0, shift
        kv[250, :, 0, :, 0] += 1.0
        outputs = [q, statistics(q)]
        bound = 8 * 400 * 2**-24  # exponents near 400 are some units of fp32 off
        o, lse = truth("attention", [q, kv], outputs)
        for name, got, want in zip(("o", "lse"), run("attention", [q, kv], outputs), (o, lse), strict=True):
            close(name, got, want, bound)
        inputs = [do, q, kv, o.float(), lse.float()]
        want, got = (how("attention_backward", inputs, [q, kv]) for how in (truth, run))
        close("dq", got[0], want[0], bound * 400)  # keys of 400, of which a difference is left
        close("dkv", got[1], want[1], bound)


def test_bad_input_is_named() -> None:
    (q, kv, mask), _ = problem((4, 6, 1, 2, 64), torch.float32, masked=True)
    lse = statistics(q)

    def refused(message: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        with pytest.raises(CinemeshError, match=message):
            attention(inputs, outputs)

    small = [rand(4, 1, 2, 32), rand(6, 1, 2, 2, 32)]
    refused("attention: q: got head dim 32, wanted 64 or 128", small, [small[0], lse])
    refused("attention: q: got dtype float64, wanted bfloat16 or float32", wide([q, kv]), [q.double(), lse])
    refused("attention: kv: got dtype bfloat16, wanted float32", [q, kv.bfloat16()], [q, lse])
    refused("attention: kv: got 1 heads, wanted 2 as in q", [q, kv[:, :, :, :1]], [q, lse])
    refused("attention: o: got 3 tokens, wanted 4 as in q", [q, kv], [q[:3], lse])
    refused("attention: lse: got dtype float64, wanted float32", [q, kv], [q, lse.double()])
    refused("attention: q: got strides .* wanted a contiguous last dim", [rand(4, 1, 2, 128)[..., ::2], kv], [q, lse])
    refused("attention: kv: got an address 4 bytes past", [q, rand(kv.numel() + 1)[1:].view(kv.shape)], [q, lse])
    refused("attention: kv: got shape .* at least one of keys", [q, kv[:0]], [q, lse])
    refused("cross_attention: mask: got 5 keys, wanted 6 as in kv", [q, kv, mask[:, :5]], [q, lse])
    refused("cross_attention: mask: got dtype float32, wanted bool", [q, kv, mask.float()], [q, lse])


def test_tensor_cores_are_not_waited_for() -> None:
    """Only here: ptxas makes each wgmma wait for the one before when it cannot follow the accumulators.

    That is right, but slow, and nothing says so. Every wgmma then has an ARRIVE of its own, else every product has one.
    """
    code = """
import subprocess, tempfile, triton
from triton.backends.compiler import GPUTarget
from cinemesh.kernels import attention, attention_backward
from cinemesh.kernels.compile import specialise
from cinemesh.kernels.spec import Sizes

model = (73_728, 1, 6144, 48, 128, 16_384, (512, 256, 100), (4096, 1472, 768), (16, 32, 96, 96), (1, 2, 2), 1 << 20)
sizes = Sizes(*model, tp=8, cp=2)
for spec in attention.compile_specs(sizes) + attention_backward.compile_specs(sizes):
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    source = triton.compiler.ASTSource(spec.kernel, *specialise(spec))
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(spec.name, sass.count(" HGMMA."), sass.count(" WARPGROUP.ARRIVE"))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: (int(wgmma), int(arrive)) for name, wgmma, arrive in map(str.split, done.stdout.splitlines())}
    # Forward: the first block's scores, too. Queries of self-attention: what brings q into registers, too.
    products = {"forward": 3, "queries": 3, "keys": 4, "attention_backward.queries": 4}
    assert len(found) == 6
    for name, (wgmma, arrive) in found.items():
        wanted = products.get(name, products.get(name.partition(".")[2]))
        assert arrive == wanted and wgmma >= 4 * arrive, f"{name}: {wgmma} in {arrive} groups"
