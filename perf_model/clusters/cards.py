"""The shipped cluster of a card that was found in a machine (torch-free)."""

from __future__ import annotations

BY_CARD = {  # the name of a card's tuning table: whose links and memory it has
    "a100": "dgx-a100-hdr200",
    "h100": "dgx-h100-ib400",
    "h200": "h200-ib400",
    "b200": "dgx-b200-ib400",
}
OTHERS = "dgx-h100-ib400"  # of every other card


def base_of(card: str) -> str:
    """The name of the cluster, by that of the card's tuning table (``kernels/tuning.py``: ``device_key``)."""
    return BY_CARD.get(card, OTHERS)
