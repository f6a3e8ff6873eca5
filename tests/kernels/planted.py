"""Kernels with faults that the compile check must see; in a file of their own, as Triton wants its sources."""

# Arguments of a kernel have no type in Python.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import os
import signal
from dataclasses import replace

import triton
import triton.language as tl

from cinemesh.kernels.spec import Spec


@triton.jit
def twice_kernel(x, y, n, BLOCK: tl.constexpr):
    """Reads its input twice, with an offset that the compiler cannot fold, and writes half of its output."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(x + at, mask=at < n)
    second = tl.load(x + (n - 1 - at), mask=at < n)
    tl.store(y + at, first + second, mask=at < n // 2)


@triton.jit
def spilling_kernel(x, y, n, BLOCK: tl.constexpr):
    """A row of 8,192 in one warp: 256 floats a thread, kept to the end."""
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    total = row
    for i in range(n):
        total += tl.load(x + i * BLOCK + at) * row
        total /= tl.sum(total, 0)
    tl.store(y + at, total + row)


def twice(elements: int = 1000, block: int = 128) -> Spec:
    programs = -(-elements // block)
    return Spec(
        "planted.twice",
        twice_kernel,
        {"x": "*fp32", "y": "*fp32", "n": "i32"},
        {"BLOCK": block},
        num_warps=4,
        num_stages=1,
        shape={"N": elements},
        least_bytes=4 * (elements + elements // 2),
        grid=(programs,),
        arguments={"x": (elements,), "y": (elements,), "n": elements},
    )


def spilling() -> Spec:
    return Spec(
        "planted.spilling",
        spilling_kernel,
        {"x": "*fp32", "y": "*fp32", "n": "i32"},
        {"BLOCK": 8192},
        num_warps=1,
        num_stages=1,
        shape={"N": 8192},
        least_bytes=0,
        arguments={"x": (8192 * 4,), "y": (8192,), "n": 4},
    )


@triton.jit
def counted_kernel(y, n: int, BLOCK: tl.constexpr):
    """Takes no count beyond 31 bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 0.0, mask=at < n)


def counted(elements: int) -> Spec:
    spec = twice(elements)
    signature = {"y": "*fp32", "n": "i32"}
    arguments = {"y": (elements,), "n": elements}
    return replace(spec, name="planted.counted", kernel=counted_kernel, signature=signature, arguments=arguments)


def raising(spec: Spec) -> None:
    """A look at a kernel of which Triton makes nothing."""
    raise ValueError("a fault")


def killed(spec: Spec) -> None:
    """A look at a kernel that the system ends, as it does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
