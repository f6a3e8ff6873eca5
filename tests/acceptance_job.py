"""A job as torchrun would start it, of forked processes: what a test has planted is there in all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cinemesh.launch.acceptance.here import AcceptanceOptions
from cinemesh.launch.acceptance.stages import STAGES, AcceptanceStage
from cinemesh.launch.acceptance.supervisor import run
from cinemesh.launch.cluster.processes import LOOPBACK, _store_on_loopback
from cinemesh.perf_model.acceptance import ACCEPTANCE_FILE

ENOUGH_S = 900.0  # of a whole job in a test: far more than it takes, also of its stages


def stages_of(*names: str) -> list[AcceptanceStage]:
    return [stage for stage in STAGES if stage.name in names]


def accept(
    out: Path, stages: Sequence[AcceptanceStage], *, world: int = 2, seconds: float = ENOUGH_S, local: int | None = None
) -> tuple[list[int | None], dict[str, Any]]:
    """Exit codes by rank, and the file."""
    store = _store_on_loopback(None)
    context = multiprocessing.get_context("fork")
    asked = AcceptanceOptions(out, seconds, "cpu", None)
    ranks = [
        context.Process(target=_rank, args=(rank, world, local or world, store.port, asked, stages))
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(ENOUGH_S)
        return [rank.exitcode for rank in ranks], json.loads((out / ACCEPTANCE_FILE).read_text())
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _rank(
    rank: int, world: int, local: int, port: int, asked: AcceptanceOptions, stages: Sequence[AcceptanceStage]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    sys.exit(run(asked, stages))
