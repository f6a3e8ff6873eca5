"""What a Triton kernel is built with, and at which sizes (torch-free).

Every Triton module exposes ``compile_specs(sizes: Sizes) -> list[Spec]``: one entry for each kernel (forward and
backward) with exactly the arguments, constants and grid that its launcher would use for a step of these sizes on an
H100. The launcher and ``compile_specs`` take their tiles from one function of the module, so that the two cannot
differ. ``kernels/compile.py`` builds the entries for a GPU that need not be there, and counts the bytes that they move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

POINTER_ALIGNMENT = 16
"""Bytes. The arena and the units align buffers to 256; a vector load takes 16, and Triton asks for no more."""


@dataclass(frozen=True)
class Sizes:
    """What one rank computes in a training step; shape letters as in the op table."""

    tokens: int  # S: tokens of a sample, over all ranks
    batch: int  # B: samples of one micro-batch on one data rank
    width: int  # D
    heads: int  # H: over all tp ranks
    head_dim: int  # K
    ffn: int  # F: over all tp ranks
    text_tokens: tuple[int, ...]  # L of each text encoder
    text_widths: tuple[int, ...]  # input width of each text encoder
    latent: tuple[int, int, int, int]  # C, T, H, W of a sample
    patch: tuple[int, int, int]  # kt, kh, kw
    shard_elements: int  # elements of the flat fp32 shard that one rank updates
    tp: int = 1
    cp: int = 1
    dtype: str = "bf16"  # of activations and gathered weights: "bf16", "fp32"

    @property
    def local_tokens(self) -> int:
        """T: rows of one rank where layers work token by token (norms, gates, residuals): split over cp and tp."""
        return self.tokens // (self.cp * self.tp)

    @property
    def context_tokens(self) -> int:
        """Token rows of one rank in attention and FFN (queries): split over cp only."""
        return self.tokens // self.cp

    @property
    def local_heads(self) -> int:
        """h: heads of one rank."""
        return self.heads // self.tp

    @property
    def local_ffn(self) -> int:
        """Columns of the FFN on one rank."""
        return self.ffn // self.tp


@dataclass(frozen=True)
class Spec:
    """One kernel as it would be launched.

    ``signature`` names the type of every argument that is not constexpr, as Triton writes it: ``*bf16``, ``*fp32``,
    ``*i64``, ``*i1`` for pointers, ``i32``, ``i64``, ``fp32`` for scalars; a tuple of them for a tuple of pointers.
    ``arguments`` holds, for each name of ``signature``, the shape of the contiguous tensor behind a pointer (a view at
    an offset into a larger buffer: the shape from the offset on) or behind each of a tuple, or the value of a scalar.
    Triton specialises on these values at launch (divisible by 16, equal to 1), and so does the compile check.
    ``least_bytes``: every element that must be read once plus every element that must be written once.
    """

    name: str  # "modulate_norm.forward": module.kernel
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    shape: Mapping[str, int]  # shape letters and their values, to print: {"T": 9216, "B": 1, "D": 6144}
    least_bytes: int
    grid: tuple[int, ...] = (1,)
    arguments: Mapping[str, int | float | tuple[int, ...]] = field(default_factory=dict)
    memory_bound: bool = True  # False: tensor cores decide (attention), and bytes over the least say little
