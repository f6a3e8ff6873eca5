"""Every implementation of an op: where it runs and how much it works on at once (torch-free).

``registry.py`` picks from this list; whatever plans a step reads the same list.
"""

from __future__ import annotations

from dataclasses import dataclass

# Draws run in chunks of this many elements: philox keeps some twenty 64-bit temporaries as large as its output.
DRAW_CHUNK = 1 << 14
# AdamW and the sum of squares walk the flat shard in chunks of this many elements: temporaries stay in cache.
FLAT_CHUNK = 1 << 16


@dataclass(frozen=True)
class Implementation:
    """``function`` of ``module`` may run ``op`` on ``devices``; the earlier in the list is preferred."""

    op: str
    module: str
    function: str
    devices: tuple[str, ...]
    why: str


# What is not listed here runs on ``reference.py``, on any device.
IMPLEMENTATIONS: tuple[Implementation, ...] = tuple(
    Implementation(
        op, "sdpa", op.removeprefix("cross_"), ("cpu",), "torch's fused CPU attention: no score matrix in memory"
    )
    for op in ("attention", "cross_attention", "attention_backward", "cross_attention_backward")
)


def choose(op: str, device: str) -> Implementation | None:
    """The first implementation for a device; None: the reference."""
    return next((entry for entry in IMPLEMENTATIONS if entry.op == op and device in entry.devices), None)
