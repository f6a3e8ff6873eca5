"""Liveness: which bytes are live at every record (torch-free).

A storage lives from the first record that writes it (or a view of it) to the last that reads or writes it. Inputs and
states live always. The placement pass (``arena.py``) packs them by exactly this rule. Every space has lifetimes of its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.dependencies import accesses
from ..ir.program import Program
from ..ir.records import BufferKind, Op, Space


@dataclass(frozen=True)
class Lifetimes:
    """``allocate[i]``, ``free[i]``: storages that record i allocates before it runs and frees after.

    ``live_bytes[i]`` while record i runs, its workspace excluded; ``workspace_bytes[i]`` that of the record alone.
    """

    persistent_bytes: int
    allocate: list[list[str]]
    free: list[list[str]]
    live_bytes: list[int]
    workspace_bytes: list[int]

    @property
    def peak_bytes(self) -> int:
        """Most bytes the program's own buffers hold at once."""
        return max(self.live_bytes, default=self.persistent_bytes)

    def peak_op(self, program: Program) -> Op:
        return program.ops[self.live_bytes.index(self.peak_bytes)]


def persistent(program: Program) -> list[str]:
    """Inputs and states: storages that are there before and after a step, in any space."""
    buffers = program.buffers.items()
    return [name for name, buffer in buffers if buffer.kind is not BufferKind.TEMPORARY and buffer.base is None]


def lifetimes(
    program: Program,
    space: Space = Space.DEVICE,
    workspace: Callable[[Program, Op], int] = Program.workspace_bytes,
) -> Lifetimes:
    """When every storage of a space is taken and given back, and its bytes live at every record of one rank.

    Workspace is on the device. ``workspace``: of a record, by default as on a CPU.
    """
    on_device = space is Space.DEVICE
    allocate: list[list[str]] = [[] for _ in program.ops]
    free: list[list[str]] = [[] for _ in program.ops]
    for root, (first, last) in accesses(program).items():
        buffer = program.buffers[root]
        if buffer.kind is BufferKind.TEMPORARY and buffer.space is space:
            allocate[first].append(root)
            free[last].append(root)
    always = sum(program.bytes(name) for name in persistent(program) if program.buffers[name].space is space)
    live, current = [], always
    for i in range(len(program.ops)):
        current += sum(map(program.bytes, allocate[i]))
        live.append(current)
        current -= sum(map(program.bytes, free[i]))
    work = [workspace(program, op) if on_device else 0 for op in program.ops]
    return Lifetimes(always, allocate, free, live, work)
