"""``judge make``: pairs of two or more systems' clips that do not say which is which (torch-free)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CinemeshError
from ..written import command, wrote

if TYPE_CHECKING:  # numpy loads with it
    from ...evaluation.blinding import Draw

MOST_PICKED = 10_000  # clips of a prompt; more are a slip


def run(
    *,
    folders: Sequence[Path],
    prompts: Path | None,
    out: Path,
    axes: Sequence[str],
    best_of: Sequence[str],
    draw: Draw,
    fitted: bool,
    examples: Path | None = None,
) -> None:
    """Write the pairs of ``folders``; ``prompts`` and ``examples``: None for those that ship. Raises CinemeshError."""
    from ...evaluation.bench import BENCH, read_prompts
    from ...evaluation.blinding import make_pairs
    from ...evaluation.examples import read_own, write_examples

    if examples is not None:
        read_own(examples)  # refused before anything is written
    picked = dict(_picked(text) for text in best_of)
    found = make_pairs(folders, read_prompts(prompts or BENCH), out, axes, picked, draw, fitted=fitted)
    try:
        write_examples(out, found.axes, examples)
    except CinemeshError as error:
        print(f"the guideline has no example clips: {error}", file=sys.stderr)
    pairs = found.pairs.values()
    checks = [sum(pair.identical for pair in pairs), sum(bool(pair.repeats) for pair in pairs)]
    wrote(
        out,
        command("judge", "serve", out),
        f"{len(pairs)} pairs of {', '.join(found.systems)}, of which {checks[0]} show one clip twice and {checks[1]} "
        "come again; key.json says which is which: keep it from raters",
    )


def _picked(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    if not name or not number.isascii() or not number.isdecimal() or not 1 <= int(number[:9]) <= MOST_PICKED:
        raise CinemeshError(
            f"--best-of {text!r} is no SYSTEM=N", remedy=f"name a folder, and of how many clips, 1 to {MOST_PICKED:,}"
        )
    return name, int(number)
