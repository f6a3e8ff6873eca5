"""All that a rank holds of its device: a program's buffers, its kernels' workspace, and what no program owns.

Torch-free: planner, preflight and runtime count by this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ...errors import CinemeshError
from ...kernels.catalogue import candidates
from ...kernels.counts import DTYPE_BYTES
from ...kernels.ops import OPS
from ...kernels.selection import PLAIN_INSTALL, Software, select
from ...kernels.tuning import DEFAULT_DEVICE
from ..ir.collectives import FUSED
from ..ir.communicators import communicators
from ..ir.plan import Plan
from ..ir.program import Program
from ..ir.records import Op, Space
from .arena import Arena, place
from .liveness import Lifetimes, lifetimes, persistent

COMMUNICATOR_BYTES = 288 << 20  # of NCCL on an H100, 24 channels: NVIDIA/nccl issue 1685, 2025-04
# Of cuBLAS on every stream that multiplies, on Hopper and newer (before: 8 MiB); cuBLASLt shares it: torch 2.11's and
# 2.13's CublasHandlePool.cpp. Two streams: a capture has its own.
BLAS_STREAM_BYTES, BLAS_STREAMS = 32 << 20, 2
# Of a captured step: 24 KiB for each of some 5,000 records, as vllm-project/vllm issue 50780 (2026) finds 24 MiB for a
# graph of some 1,000 kernels. Not measured here.
GRAPH_BYTES = 120 << 20


@dataclass
class Workspaces:
    """What the kernels of a device (``cpu``, ``sm_90``) take besides their outputs; ``tuned``: whose tuning table.

    On a CPU, and of a plain form anywhere, as the op table says.
    """

    device: str
    software: Software = PLAIN_INSTALL
    tuned: str = DEFAULT_DEVICE
    _known: dict[object, int] = field(default_factory=dict)

    def bytes(self, program: Program, op: Op) -> int:
        """Of the kernel that will run a record. Raises CinemeshError for an override that cannot be met."""
        if self.device == "cpu" or (op.kind not in OPS and op.kind not in FUSED):
            return program.workspace_bytes(op)
        if op.kind in FUSED:
            return max(self.bytes(program, part) for part in op.parts)
        key = program.alike(op)
        if key not in self._known:
            self._known[key] = self._of(program, op)
        return self._known[key]

    def _of(self, program: Program, op: Op) -> int:
        sizes = program.label_sizes(op)
        dtypes = (program.buffers[name].dtype for name in (*op.inputs, *op.outputs))
        dtype = next((name for name in dtypes if name not in ("bool", "int64")), "bool")
        chosen = select(op.kind, self.device, self.software, dtype=dtype, sizes=sizes, tuned=self.tuned).entry
        if chosen is candidates(op.kind)[-1]:  # the reference
            return program.workspace_bytes(op)
        return chosen.workspace(sizes, DTYPE_BYTES[dtype])


def bytes_beside(
    plan: Plan, context_bytes: float, communicator_bytes: float = COMMUNICATOR_BYTES, *, graphs: int
) -> dict[str, int]:
    """Bytes of a device that no program owns, by what holds them.

    The CUDA context, every communicator held, cuBLAS on its streams, and ``graphs`` captured steps. None of the last
    two on a CPU: ``graphs`` is 0.
    """
    streams = BLAS_STREAMS + plan.fused_tp if graphs else 0  # fused products run on one more
    return {
        "CUDA context": int(context_bytes),
        "NCCL": int(communicator_bytes) * len(communicators(plan)),
        "cuBLAS": BLAS_STREAM_BYTES * streams,
        "CUDA graphs": GRAPH_BYTES * graphs,
    }


def check_fits(
    program: Program,
    memory_bytes: int,
    workspace: Callable[[Program, Op], int] = Program.workspace_bytes,
    *,
    beside: Mapping[str, int] | None = None,
    shared: Collection[str] = (),
    arena_bytes: int = 0,
    placed: Arena | None = None,
) -> None:
    """Raise CinemeshError when a program needs more than the ``memory_bytes`` that a device has left.

    ``beside``: bytes to come that no program owns. Held already: ``shared`` storages, and an arena of ``arena_bytes``.
    ``placed``: where its temporaries lie, if that is known.
    """
    held = [name for name in persistent(program) if program.buffers[name].space is Space.DEVICE]
    needs = {
        "states and inputs": sum(map(program.bytes, held)) - sum(map(program.bytes, shared)),
        "arena": max(0, (placed or place(program)).total_bytes - arena_bytes),
        "workspace": max((workspace(program, op) for op in program.ops), default=0),
    } | dict(beside or {})
    if (needed := sum(needs.values())) > memory_bytes:
        raise _too_large(program, lifetimes(program), needs, needed, memory_bytes)


def _too_large(
    program: Program, lives: Lifetimes, needs: Mapping[str, int], needed: int, memory_bytes: int
) -> CinemeshError:
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needs.items() if size)
    return CinemeshError(
        f"a step needs {needed / 1e9:.2f} GB of each device ({parts}), {(needed - memory_bytes) / 1e9:.2f} GB more "
        f"than the {memory_bytes / 1e9:.2f} GB that are left there, and the arena is fullest at "
        f"{lives.peak_op(program).name}",
        remedy="recompute more (recompute=full), raise tp or cp (activations) or dp_shard (states), or lower prefetch",
    )
