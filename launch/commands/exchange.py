"""``cinemesh export``, ``import`` and ``merge``: weights for other programs, and from them; factors on their base."""

from __future__ import annotations

from pathlib import Path

from ..exchange.exporting import export, found_checkpoint
from ..exchange.importing import import_weights
from ..exchange.merging import merge
from ..storage.places import location_of
from ..written import wrote


def run_export(checkpoint: str, folder: Path, *, weights: str, dtype: str | None, file_bytes: int) -> None:
    """Write ``folder``."""
    found = found_checkpoint(checkpoint)
    config = export(found, folder, which=weights, dtype=dtype, file_bytes=file_bytes)
    reader = "MovieGenTransformer.from_pretrained in its movie_gen.py"
    if config.lora is not None:
        reader = "PeftModel.from_pretrained, on an export of their base"
    wrote(folder, reader, f"{weights} of {found}, {config.name}")


def run_merge(checkpoint: str, out: str, base: str | None) -> None:
    """Write the checkpoint ``out``."""
    found = found_checkpoint(checkpoint)
    place = location_of(out)
    config = merge(found, place, location_of(base) if base is not None else None)
    wrote(place, f"cinemesh sample RECIPE --checkpoint {out} --prompt TEXT", f"{found}, merged, {config.name}")


def run_import(folder: Path, out: str) -> None:
    """Write the checkpoint ``out``."""
    place = location_of(out)
    config = import_weights(folder, place)
    wrote(place, f"cinemesh sample RECIPE --checkpoint {out} --prompt TEXT", config.name)
