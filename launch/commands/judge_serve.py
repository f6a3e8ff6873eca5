"""``judge serve``: the page on which people judge (torch-free)."""

from __future__ import annotations

import sys
from pathlib import Path

from ...evaluation.votes import VOTES_FILE
from ..written import command


def run(*, folder: Path, port: int) -> None:
    """Serve until Ctrl-C. Raises CinemeshError for a folder without pairs, and where the port is taken."""
    from ...evaluation.serving import JudgeServer

    server = JudgeServer(folder, port)
    print(
        f"judge at {server.address}, end with Ctrl-C; next: {command('judge', 'score', folder / VOTES_FILE)}",
        file=sys.stderr,
        flush=True,
    )
    try:
        server.serve_forever()
    finally:
        server.server_close()
