"""Whether what CPU processes will hold fits into this machine, told before anything is allocated (torch-free)."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import CinemeshError
from ..memory import available_bytes
from ..parallel.ir.program import Program
from ..parallel.ir.records import Space
from ..parallel.passes.arena import place
from ..parallel.passes.liveness import lifetimes

PROCESS_BYTES = 300_000_000  # of Python, torch and its libraries, before a tensor: 304 MB measured on 2026-11-29
STEP_BYTES = 112  # of the order of all steps, for each of them, at its making: measured with two buckets on 2026-11-29


def check_host_memory(programs: Iterable[Program], processes: int, *, steps: int = 0, beside_bytes: int = 0) -> None:
    """Raise CinemeshError when ``processes`` of this machine will not find memory for the largest of ``programs``.

    ``steps``: of a run that draws the order of all of them. ``beside_bytes``: what each process holds besides.
    """
    largest = (0, 0)  # bytes of states, and of all that a program holds
    for program in programs:
        lives = lifetimes(program)
        arenas = (place(program, lifetimes(program, space)).total_bytes for space in Space)
        whole = lives.persistent_bytes + sum(arenas) + max(lives.workspace_bytes, default=0)
        largest = max(largest, (lives.persistent_bytes, whole), key=lambda pair: pair[1])
    states, held = (beside_bytes + size for size in largest)
    free, order = available_bytes(), steps * STEP_BYTES
    needed = processes * (held + order + PROCESS_BYTES)
    if needed <= free:
        return
    if processes * (order + PROCESS_BYTES) > free:
        remedy = "start fewer processes, end other jobs" + (
            ", or lower schedule.steps" if order > PROCESS_BYTES else ""
        )
    elif processes * (states + order + PROCESS_BYTES) > free:
        remedy = f"choose a smaller model: its states alone are {states / 1e9:.1f} GB a process"
    else:
        remedy = "choose a smaller batch or shorter, smaller clips, or keep less (recompute=full)"
    parts = f"{held / 1e9:.1f} GB of buffers" + (f", {order / 1e9:.1f} GB for {steps:,} steps" if order > 1e8 else "")
    counted = "this process" if processes == 1 else f"each of the {processes} processes of this machine"
    raise CinemeshError(
        f"{counted} needs {parts} and {PROCESS_BYTES / 1e9:.1f} GB for itself, together {needed / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are available",
        remedy=remedy,
    )
