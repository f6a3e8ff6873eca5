"""What torchrun's agents must be told for nodes that join a job after others: by whoever starts them (torch-free)."""

from __future__ import annotations

import os

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
OWN_STORE_WHY = "a store of its own for every round: in torch 2.13 a node that joins later looks for that of the first"


def missing_own_store() -> str | None:
    """What to say where torchrun may start ranks again, on several nodes, and was not told so."""
    given = os.environ.get
    nodes, restarts = (int(given(name, "0")) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if nodes < 2 or not restarts or given("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return f"start torchrun with {OWN_STORE}=1: {OWN_STORE_WHY}"
