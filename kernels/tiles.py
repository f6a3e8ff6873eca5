"""How the memory-bound kernels cut their tensors: tiles, programs, scratch (torch-free).

A memory-bound kernel is as fast as the bytes it moves, so two things matter: every access is 16 bytes wide and enough
of them are under way (Little's law: 3.35e12 B/s * 0.7 us of latency / 132 multiprocessors = 18 kB each, in the H100 SXM
datasheet's bandwidth), and what a program reads or writes besides its share of the tensors (a gain, partial sums) is
spread over so many tokens that it stays below one part in twenty.

The number of programs follows from shapes alone, never from the device: sums then run in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .spec import Spec

MULTIPROCESSORS = 132  # of an H100 SXM
SUM_BLOCK = 4096  # elements that a program of a flat sum adds at once
ITEM_BYTES = {"bf16": 2, "fp32": 4}
TRITON_DTYPES = {"bfloat16": "bf16", "float32": "fp32", "int64": "i64", "bool": "i1"}


@dataclass(frozen=True)
class Launch:
    """One launch: ``kernel[grid](*arguments, **constexprs, num_warps=..., num_stages=...)``."""

    grid: tuple[int, ...]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    options: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        launch_options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        object.__setattr__(self, "options", {**self.constexprs, **launch_options})

    def run(self, kernel: Any, *arguments: Any) -> None:
        """``kernel`` is a @triton.jit function."""
        kernel[self.grid](*arguments, **self.options)

    def spec(
        self,
        name: str,
        kernel: Any,
        tensors: Mapping[str, tuple[str | tuple[str, ...], tuple[int, ...]]],
        scalars: Mapping[str, tuple[str, int | float]],
        shape: Mapping[str, int],
        least_bytes: int,
    ) -> Spec:
        """This launch for the compile check.

        ``tensors``: {argument: (element type, shape)}, in the kernel's order; several types: a tuple of such tensors.
        """
        signature: dict[str, str | tuple[str, ...]] = {
            argument: f"*{kind}" if isinstance(kind, str) else tuple(f"*{each}" for each in kind)
            for argument, (kind, _) in tensors.items()
        }
        signature |= {argument: kind for argument, (kind, _) in scalars.items()}
        arguments: dict[str, int | float | tuple[int, ...]] = {name: size for name, (_, size) in tensors.items()}
        arguments |= {argument: value for argument, (_, value) in scalars.items()}
        return Spec(
            name,
            kernel,
            signature,
            dict(self.constexprs),
            self.num_warps,
            self.num_stages,
            shape,
            least_bytes,
            self.grid,
            arguments,
        )


def cover(size: int, block: int) -> int:
    """Blocks that cover ``size``."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``: a tile's extent; what lies beyond ``size`` is masked off."""
    return 1 << (size - 1).bit_length()


def row_warps(block: int) -> int:
    """Warps that hold a row of ``block`` fp32 in registers, several times over: 16 floats a thread of each."""
    return min(32 if block > 8192 else 16, max(1, block // 256))


# -- slices: how many partial sums there are ---------------------------------------------------------------------------


def norm_slices(tokens: int, batch: int) -> int:
    """Of a sample's tokens, in the modulated norm's backward; ``modulate_norm.py`` says why 72, 64 and 128."""
    programs = min(128, max(tokens * batch // 72, 64))
    return max(1, min(programs // batch, tokens))


def layer_norm_slices(rows: int) -> int:
    """Of the rows of text; ``layer_norm.py`` says why 48."""
    return max(1, min(MULTIPROCESSORS, rows // 48))


def gate_slices(tokens: int, tokens_at_once: int = 8) -> int:
    """Of a sample's tokens, in the gated residual's backward; ``gated_residual.py`` says why 64."""
    return min(64, cover(tokens, tokens_at_once))


def flat_sums(elements: int) -> int:
    """Programs that sum a flat tensor, eight to a multiprocessor at most, each as many blocks of ``SUM_BLOCK``."""
    blocks = cover(elements, SUM_BLOCK)
    return cover(blocks, cover(blocks, 1024))
