"""What a machine is, as one process of it finds it: software, GPUs, NICs, room, limits, clock."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels.packages import version_of
from ...memory import available_bytes
from ...parallel.runtime.comm import nccl_stack
from ..cluster.alike import DISTRIBUTIONS, code
from ..cluster.cards import CardFacts, cards_here, driver_version

PORTS = Path("/sys/class/infiniband")
SHM = Path("/dev/shm")  # nosec B108  its free bytes are asked for


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """One machine. ``software`` must be the same on all of them; ``overlap_lost``: what NCCL and driver take from it.

    ``no_cards``: why no GPU is seen; ``strangers``: pairs of GPUs that do not reach each other's memory; ``ports``: of
    InfiniBand and RoCE adapters, with the state of each; ``shm_bytes``, ``disk_bytes``: free, -1 where there is none;
    ``clock_ahead_s``: of this clock, before that of who keeps ``directory``.
    """

    host: str
    software: dict[str, str]
    overlap_lost: str
    cards: list[CardFacts]
    no_cards: str
    strangers: list[str]
    ports: dict[str, str]
    shm_bytes: int
    open_files: int
    memory_bytes: int
    cores: int
    directory: str
    disk_bytes: int
    clock_ahead_s: float | None


def machine_host() -> str:
    """This machine's name, as Slurm has it where it runs this."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def machine_facts(directory: Path) -> MachineFacts:
    """Of this machine; ``directory``: where runs write."""
    cards, why = cards_here()
    stack = nccl_stack() if torch.cuda.is_available() else None
    return MachineFacts(
        host=machine_host(),
        software=software(),
        overlap_lost=stack.told() if stack is not None else "",
        cards=cards,
        no_cards=why,
        strangers=_strangers(),
        ports=_ports(PORTS),
        shm_bytes=_free(SHM),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memory_bytes=available_bytes(),
        cores=len(os.sched_getaffinity(0)),
        directory=str(directory),
        disk_bytes=_free(directory),
        clock_ahead_s=_ahead(directory),
    )


def software() -> dict[str, str]:
    """Name -> release of what ranks must have alike (``cluster/alike.py``); ``code``: of this package's own files."""
    found = {"python": platform.python_version()}
    found |= {name: release for name in ("cinemesh", *DISTRIBUTIONS) if (release := version_of(name)) is not None}
    found |= {"torch": torch.__version__, "code": code()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if driver := driver_version():
        found["driver"] = driver
    if torch.cuda.is_available():
        stack = nccl_stack()
        found["nccl"], found["driver's cuda"] = (".".join(map(str, of)) for of in (stack.nccl, stack.driver))
    return found


def _strangers() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]


def _ports(root: Path) -> dict[str, str]:
    """``mlx5_0/1`` -> ``ACTIVE``."""
    found: dict[str, str] = {}
    for state in sorted(root.glob("*/ports/*/state")):
        with contextlib.suppress(OSError):
            name = f"{state.parts[-4]}/{state.parts[-2]}"
            found[name] = state.read_text(encoding="utf-8").strip().rpartition(" ")[2]
    return found


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return -1


def _ahead(directory: Path) -> float | None:
    """What a file that is written there now says of the time."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            before = time.time()
            os.utime(file.name)
            return before - os.stat(file.name).st_mtime
    except OSError:
        return None
