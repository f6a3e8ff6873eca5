"""The GPU of this machine as NVML tells of it: no CUDA context is made, no torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """``device``: as ``sm_90``. ``memory_bytes``: all that it has."""

    device: str
    name: str
    memory_bytes: int


def card_here() -> Card | None:
    """The first GPU of this machine; None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return None
    return Card(f"sm_{major}{minor}", name, int(memory.total))
