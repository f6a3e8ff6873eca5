"""Op and device -> the function that runs it, as ``catalogue.py`` lists them."""

from __future__ import annotations

from importlib import import_module

from .catalogue import choose
from .reference import REFERENCE, Kernel


def kernels_for(device: str) -> dict[str, Kernel]:
    """Op name -> implementation on ``device`` (``cpu`` or ``cuda``)."""
    chosen = dict(REFERENCE)
    for op in REFERENCE:
        if (entry := choose(op, device)) is not None:
            chosen[op] = getattr(import_module(f".{entry.module}", __package__), entry.function)
    return chosen
