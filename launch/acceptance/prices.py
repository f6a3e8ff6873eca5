"""The cluster whose prices stand beside what an acceptance run measures."""

from __future__ import annotations

import torch

from ...kernels.tuning import device_key
from ...perf_model.clusters.cards import base_of
from ..training.measured_rows import NO_CLUSTER
from .here import AcceptanceOptions


def priced_on(asked: AcceptanceOptions, device: str) -> str:
    """The one that is asked for, else by the card; its name or file."""
    if asked.cluster is not None:
        return asked.cluster
    if device == "cpu":
        return NO_CLUSTER
    return base_of(device_key(torch.cuda.get_device_name(device)))
