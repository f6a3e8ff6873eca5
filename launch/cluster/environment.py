"""The environment of a process: how many there are of its job, and what it computes on.

GPUs are those that the process sees: all of its machine (that of ``LOCAL_RANK`` is its own), or one that the launcher
left it (``srun --gpus-per-task=1``, a container's, ``CUDA_VISIBLE_DEVICES`` of each process). Whether a process that
sees one GPU has it to itself is known when the ranks meet: each lays claim to its GPU by the GPU's own number.
"""

from __future__ import annotations

import os
import stat
import sys

import torch
from torch.distributed.distributed_c10d import Store

from ...errors import CinemeshError
from ..elastic import missing_own_store
from ..options import Device

ON_CPU = "compute on the CPU: --device cpu, or device: cpu in the recipe"


def launched() -> bool:
    """Whether torchrun, or a launcher that speaks its environment, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size(nproc: int | None) -> int:
    """Processes of this job. Raises CinemeshError for ``--nproc`` under torchrun."""
    if launched():
        if nproc is not None:
            raise CinemeshError(
                f"--nproc {nproc} inside a job of {os.environ['WORLD_SIZE']} processes: torchrun has started the "
                "processes already",
                remedy="leave --nproc out",
            )
        return int(os.environ["WORLD_SIZE"])
    return nproc or 1


def processes_here(world: int) -> int:
    """Of a job of ``world`` processes, those of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else world


def cores_each(processes: int) -> int:
    """Of the cores that this process may use, its own share, beside others of this machine; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


# -- the device -------------------------------------------------------------------------------------------------------


def visible_gpus() -> int:
    """GPUs that this process sees and torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def number_of(device: str) -> str:
    """Of a GPU: no two have the same, and every process sees the same; of a part of one (MIG), its own."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_here(wanted: Device, local: int) -> str:
    """What this process, one of ``local`` of this machine, computes on: ``cpu``, or its GPU as torch names it.

    Also of ranks that this process is about to start, which will see what it sees. Raises CinemeshError for ``cuda``
    without a GPU, and for GPUs that are fewer than the processes: none of these ends on the CPU by itself.
    """
    gpus = 0 if wanted == "cpu" else visible_gpus()
    if gpus == 0:
        if wanted == "cuda":
            raise CinemeshError(f"device is cuda, and {_none()}", remedy=f"start it where there is one, or {ON_CPU}")
        return "cpu"
    own = launched() and gpus == 1  # the launcher may have left each process another
    index = 0 if own else int(os.environ.get("LOCAL_RANK", "0"))
    if not own and max(local, index + 1) > gpus:
        raise CinemeshError(
            f"{max(local, index + 1)} processes on this machine, and GPUs visible: {gpus}",
            remedy=f"start one process a GPU, or {ON_CPU}",
        )
    return f"cuda:{index}"


def say_device(wanted: Device, local: int) -> None:
    """The first lines of a run, on rank 0: that it is on the CPU unasked, what its launcher lacks. Raises as above."""
    if int(os.environ.get("RANK", "0")) == 0 and (lacks := missing_own_store()):
        print(f"WARNING: {lacks}", file=sys.stderr)
    if device_here(wanted, local) == "cpu" and wanted == "auto" and int(os.environ.get("RANK", "0")) == 0:
        print(f"computing on the CPU: {_none()}", file=sys.stderr)


def check_kernel_cache() -> None:
    """Make the folder of compiled kernels that the environment names. Raises CinemeshError where others may write.

    What lies there is loaded as code. One made ahead by another user of a node, in ``/tmp``, could hold theirs.
    """
    folder = os.environ.get("TRITON_CACHE_DIR")
    if not folder:
        return
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        there = os.lstat(folder)
    except OSError as error:
        raise CinemeshError(
            f"TRITON_CACHE_DIR is {folder}: {error.strerror}", remedy="name a folder that can be made"
        ) from None
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o022:
        raise CinemeshError(
            f"TRITON_CACHE_DIR is {folder}, of user {there.st_uid} with mode {there.st_mode & 0o777:o}: kernels there "
            f"are run as code, so it must be a folder of user {os.getuid()} that others cannot write",
            remedy="name another",
        )


def _none() -> str:
    built = torch.backends.cuda.is_built()
    return "this process sees no GPU" if built else f"torch {torch.__version__} is built without CUDA"


def claim(store: Store, rank: int, device: str) -> None:
    """Lay claim to a device for this rank; ``store`` is the job's.

    Raises CinemeshError when another rank has claimed the same GPU, and when the first rank that did is on the CPU and
    this one not, or the other way round.
    """
    kind = device.partition(":")[0]
    first, by = store.compare_set("cinemesh/device", "", f"{kind} {rank}").decode().split()
    if first != kind:
        raise CinemeshError(
            f"rank {rank} computes on {kind}, rank {by} on {first}",
            remedy=f"let every process see a GPU, or {ON_CPU}",
        )
    if kind == "cpu":
        return
    number = number_of(device)
    holder = store.compare_set(f"cinemesh/gpu/{number}", "", str(rank)).decode()
    if holder != str(rank):
        raise CinemeshError(
            f"ranks {holder} and {rank} compute on one GPU, {number}",
            remedy=f"start one process a GPU, show each of them another or all of them all, or {ON_CPU}",
        )
