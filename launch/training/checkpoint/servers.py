"""One file a server: the ranks of a server lend their copies of the states to one of them, which writes them all.

The memory is anonymous and shared: it is found through its owner's process (``/proc/PID/fd``), takes nothing of
``/dev/shm``, and is gone with its last user, however that ends.
"""

from __future__ import annotations

import mmap
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import CinemeshError, in_a_line
from ....parallel.runtime.comm import gather_objects

FILE_A_RANK = "write logging.checkpoint_files: rank"


@dataclass(frozen=True)
class Lent:
    """A rank's memory: of which server, of which process and under which of its numbers, and its bytes."""

    server: str
    pid: int
    number: int
    size_bytes: int

    @classmethod
    def of(cls, size_bytes: int) -> Lent:
        """New memory of this process. Raises CinemeshError where there is none of that kind."""
        try:
            number = os.memfd_create("checkpoint")
            os.ftruncate(number, size_bytes)
        except (AttributeError, OSError) as error:
            raise CinemeshError(
                f"logging.checkpoint_files is server, and memory cannot be shared here: {in_a_line(error)}",
                remedy=FILE_A_RANK,
            ) from error
        return cls(_server(), os.getpid(), number, size_bytes)

    def mine(self) -> Tensor:
        """Its bytes, to its owner."""
        return torch.frombuffer(mmap.mmap(self.number, self.size_bytes), dtype=torch.uint8)

    def seen(self) -> memoryview:
        """Its bytes, to another process of the server, which may not change them. Raises CinemeshError."""
        path = Path(f"/proc/{self.pid}/fd/{self.number}")
        try:
            opened = os.open(path, os.O_RDONLY)
            try:
                return memoryview(mmap.mmap(opened, self.size_bytes, prot=mmap.PROT_READ))
            finally:
                os.close(opened)
        except (OSError, ValueError) as error:
            raise CinemeshError(
                f"logging.checkpoint_files is server, and {path} cannot be read: {in_a_line(error)}",
                remedy=FILE_A_RANK,
            ) from error


def ranks_here(lent: Lent) -> tuple[list[int], list[Lent]]:
    """The ranks of this one's server, the first of which writes; and what each lends. Collective."""
    every: list[Any] = gather_objects(lent)
    here = [rank for rank, one in enumerate(every) if one.server == lent.server]
    return here, [every[rank] for rank in here]


def _server() -> str:
    """Processes that see one another: of one host, and of one container there."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
