"""``cinemesh export`` and ``cinemesh import``: weights for other programs, and from them."""

from __future__ import annotations

from pathlib import Path

from ..exchange.exporting import export, found_checkpoint
from ..exchange.importing import import_weights
from ..written import wrote


def run_export(checkpoint: Path, folder: Path, *, weights: str, dtype: str | None, file_bytes: int) -> None:
    """Write ``folder``."""
    found = found_checkpoint(checkpoint)
    config = export(found, folder, which=weights, dtype=dtype, file_bytes=file_bytes)
    wrote(folder, "MovieGenTransformer.from_pretrained in its movie_gen.py", f"{weights} of {found}, {config.name}")


def run_import(folder: Path, out: Path) -> None:
    """Write the checkpoint ``out``."""
    config = import_weights(folder, out)
    wrote(out, f"cinemesh sample RECIPE --checkpoint {out} --prompt TEXT", config.name)
