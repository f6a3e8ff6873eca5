"""What a launcher asks about the device that its tensors are on: the name of its tuning table, and scratch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .tuning import DEFAULT_DEVICE, device_key


def table_of(x: Tensor) -> str:
    """Name of the tuning table of the device that ``x`` is on; the default's under the interpreter."""
    return _table(x.device.index or 0) if x.is_cuda else DEFAULT_DEVICE


@lru_cache(maxsize=64)
def _table(index: int) -> str:
    return device_key(torch.cuda.get_device_name(index))


def scratch(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised fp32 for partial sums, on the device of ``like``."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
