"""``cinemesh curate``: its options and help (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ...ranges import PROCESSES_RANGE
from ..examples import epilog
from ..options import AsJson, Overrides, bounds

curation = typer.Typer(rich_markup_mode=None)


@curation.command(epilog=epilog("curate"))
def curate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML: a preset, sources, and what changes in the preset.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="For the tables, the page and what is measured.")],
    workers: Annotated[
        int, typer.Option("--workers", **bounds(PROCESSES_RANGE), help="Processes that measure; with ray: cores.")
    ] = 2,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="processes, on this machine, or ray, on a cluster.")
    ] = "processes",
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="CONFIG", help="Recipe whose text encoders the captions are counted for."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Turn raw videos and images into a training set, and show what was dropped, by which stage, and why.

    Files are cut into shots and clips and measured; limits decide what stays. Measures are kept in DIR:
    a run that was stopped goes on, and another limit decides anew and reads no video again. Writes
    clips.parquet (every clip, with its measures and what dropped it), curated.parquet (what is left, for
    the latent cache) and report.html. Presets: low, high, high+, sft with the paper's limits, small.
    """
    from ..commands.curate import run

    run(
        config=config, out=out, workers=workers, engine=engine, recipe=recipe, overrides=overrides or [],
        as_json=as_json,
    )  # fmt: skip
