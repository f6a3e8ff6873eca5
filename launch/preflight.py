"""Whether what processes will hold fits into this machine and its GPUs, told before anything is allocated (torch-free).

Of the host, memory that is pinned counts as any other. Linux's limit of locked memory (``ulimit -l``) is not looked at:
NVIDIA's driver pins pages without asking for it (os_lock_user_pages, kernel-open/nvidia/os-mlock.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import CinemeshError
from ..kernels.selection import Software
from ..kernels.tuning import device_key
from ..memory import available_bytes
from ..parallel.ir.program import Program
from ..parallel.ir.records import Space
from ..parallel.passes.arena import place
from ..parallel.passes.device_memory import Workspaces, bytes_beside, check_fits
from ..parallel.passes.liveness import lifetimes
from .card import card_here

PROCESS_BYTES = 300_000_000  # of Python, torch and its libraries, before a tensor: 304 MB measured on 2026-11-29
STEP_BYTES = 112  # of the order of all steps, for each of them, at its making: measured with two buckets on 2026-11-29


def check_device_memory(programs: Sequence[Program], software: Software, encoder_bytes: int = 0) -> None:
    """Raise CinemeshError when a GPU of this machine is too small for one of the steps that a run captures.

    ``encoder_bytes``: of text encoders that run in the loop.
    By its whole memory: what is free of it, the ranks find out. Where NVML tells of no GPU, nothing is refused here.
    """
    if (card := card_here()) is None:
        return
    kernels = Workspaces(card.device, software, device_key(card.name))
    for program in programs:
        beside = bytes_beside(program.plan, 0, graphs=len(programs)) | {"frozen encoders": encoder_bytes}
        check_fits(program, card.memory_bytes, kernels.bytes, beside=beside)


def check_host_memory(
    programs: Iterable[Program], processes: int, *, steps: int = 0, beside_bytes: int = 0, on_gpus: bool = False
) -> None:
    """Raise CinemeshError when ``processes`` of this machine will not find memory for the largest of ``programs``.

    ``steps``: of a run that draws the order of all of them. ``beside_bytes``: what each process holds besides.
    ``on_gpus``: only what a plan offloads lies in host memory.
    """
    largest = (0, 0)  # bytes of states, and of all that a program holds
    for program in programs:
        held = [place(program, lifetimes(program, space)).total_bytes for space in Space if space is not Space.DEVICE]
        states = 0
        if not on_gpus:
            lives = lifetimes(program)
            states = lives.persistent_bytes
            held += [states, place(program, lives).total_bytes, max(lives.workspace_bytes, default=0)]
        largest = max(largest, (states, sum(held)), key=lambda pair: pair[1])
    states, needs = (beside_bytes + size for size in largest)
    free, order = available_bytes(), steps * STEP_BYTES
    needed = processes * (needs + order + PROCESS_BYTES)
    if needed <= free:
        return
    if processes * (order + PROCESS_BYTES) > free:
        remedy = "start fewer processes, end other jobs" + (
            ", or lower schedule.steps" if order > PROCESS_BYTES else ""
        )
    elif on_gpus:
        remedy = "offload fewer activations, in fewer blocks (raise last_blocks), or raise tp or cp"
    elif processes * (states + order + PROCESS_BYTES) > free:
        remedy = f"choose a smaller model: its states alone are {states / 1e9:.1f} GB a process"
    else:
        remedy = "choose a smaller batch or shorter, smaller clips, or keep less (recompute=full)"
    buffers = "pinned host memory" if on_gpus else "buffers"
    parts = f"{needs / 1e9:.1f} GB of {buffers}" + (
        f", {order / 1e9:.1f} GB for {steps:,} steps" if order > 1e8 else ""
    )
    counted = "this process" if processes == 1 else f"each of the {processes} processes of this machine"
    raise CinemeshError(
        f"{counted} needs {parts} and {PROCESS_BYTES / 1e9:.1f} GB for itself, together {needed / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are available",
        remedy=remedy,
    )
