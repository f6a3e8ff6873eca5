"""``judge export`` and ``judge import``: pairs for Label Studio, and its annotators' votes (torch-free)."""

from __future__ import annotations

import sys
from pathlib import Path

from ...errors import CinemeshError
from ...evaluation.votes import VOTES_FILE
from ..written import command, wrote


def export_for_label_studio(*, folder: Path, out: Path, clips_at: str | None) -> None:
    """Write tasks and interface of the pairs in ``folder``. Raises CinemeshError."""
    from ...evaluation.blinding import read_pairs
    from ...evaluation.label_studio import clips_beside, write_tasks

    shown = read_pairs(folder)
    at = clips_at or clips_beside(folder)
    count = write_tasks(shown, out, at if at.endswith(("/", "=")) else f"{at}/")
    most = max(axis.raters for axis in shown.axes)
    about = f"{count} tasks; {most} annotators a task, or as many as its field raters says"
    wrote(out, command("judge", "import", "EXPORT.json", folder), about)


def import_from_label_studio(*, exported: Path, folder: Path) -> None:
    """Add the votes of an export to those of ``folder``. Raises CinemeshError, and adds none, where one is wrong."""
    from ...evaluation.ballot_box import BallotBox
    from ...evaluation.blinding import read_pairs
    from ...evaluation.label_studio import read_export

    shown = read_pairs(folder)
    pairs = {pair.name: pair for pair in shown.pairs}
    found = read_export(exported, pairs, {axis.name: axis for axis in shown.axes})
    for why, count in found.skipped.items():
        print(f"{count} annotations are {why}, and no votes", file=sys.stderr)
    if not found.votes:
        raise CinemeshError(f"the export {exported} holds no vote", remedy="export it when annotators have answered")
    box = BallotBox(folder, shown)
    try:
        added = box.add_all(found.votes)
    finally:
        box.close()
    wrote(
        folder / VOTES_FILE, command("judge", "score", folder / VOTES_FILE), f"{added} of {len(found.votes)} votes new"
    )
