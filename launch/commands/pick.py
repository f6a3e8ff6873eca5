"""``pick serve`` and ``pick export``: what people keep of a manifest for finetuning."""

from __future__ import annotations

import sys
from pathlib import Path

from ...data.manifest import ENDING
from ...errors import CinemeshError
from ...evaluation.picking_page import PickingServer
from ...evaluation.picks import clips_to_pick, read_picks, write_picked
from ...files import check_output_file
from ..written import command, wrote


def serve_clips(*, manifest: Path, port: int) -> None:
    """Serve until Ctrl-C. Raises CinemeshError for a manifest without clips to show, and where the port is taken."""
    server = PickingServer(manifest, port)
    left = len(server.clips) - len(server.picks.given())
    then = command("pick", "export", manifest, out=manifest.with_name(f"picked{ENDING}"))
    print(f"{left} of {len(server.clips)} clips to look at, at {server.address}; end with Ctrl-C; next: {then}",
          file=sys.stderr, flush=True)  # fmt: skip
    try:
        server.serve_forever()
    finally:
        server.server_close()


def export_picked(*, manifest: Path, out: Path) -> None:
    """Write what was kept. Raises CinemeshError where nothing was, and for a file that is none to write."""
    if out.suffix != ENDING:
        raise CinemeshError(f"--out {out} is no {ENDING} file", remedy=f"name one, picked{ENDING}")
    if out.resolve() == manifest.resolve():
        raise CinemeshError(f"--out {out} is the manifest itself", remedy="name another file")
    check_output_file(out, "--out")
    clips = clips_to_pick(manifest)
    picks = read_picks(manifest, clips)
    kept = write_picked(manifest, out, clips, picks)
    about = f"{kept} of {len(clips)} clips, {len(picks) - kept} dropped, {len(clips) - len(picks)} not looked at"
    wrote(out, f"train on it: --set data.captions={out}", about)
