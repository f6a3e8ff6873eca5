"""The cluster whose prices stand beside what an acceptance run measures."""

from __future__ import annotations

import torch

from ...kernels.tuning import device_key
from ..training.measured_rows import NO_CLUSTER
from .here import AcceptanceOptions

BY_CARD = {  # the name of a card's tuning table: a shipped cluster of such cards
    "a100": "dgx-a100-hdr200",
    "h100": "dgx-h100-ib400",
    "h200": "h200-ib400",
    "b200": "dgx-b200-ib400",
}
UNKNOWN = "dgx-h100-ib400"  # of every other card


def priced_on(asked: AcceptanceOptions, device: str) -> str:
    """The one that is asked for, else by the card; its name or file."""
    if asked.cluster is not None:
        return asked.cluster
    if device == "cpu":
        return NO_CLUSTER
    return BY_CARD.get(device_key(torch.cuda.get_device_name(device)), UNKNOWN)
