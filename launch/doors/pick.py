"""``cinemesh pick``: options and help of its subcommands (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ..examples import epilog
from ..options import bounds
from .judge import PORT_RANGE

Manifest = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="Clips, for example curated.parquet of cinemesh curate.")
]

pick = typer.Typer(name="pick", no_args_is_help=True, rich_markup_mode=None)


@pick.callback()
def picking() -> None:
    """Let people pick, trim and caption clips for finetuning, with a checklist."""


@pick.command(epilog=epilog("pick serve"))
def serve(
    manifest: Manifest,
    port: Annotated[int, typer.Option("--port", **bounds(PORT_RANGE), help="0: any that is free.")] = 8323,
) -> None:
    """Serve the page on which people pick clips.

    On this machine alone, at 127.0.0.1. A pick is on the disk, in picks.jsonl beside the manifest, before
    the next clip; the last one on a clip counts.
    """
    from ..commands.pick import serve_clips

    serve_clips(manifest=manifest, port=port)


@pick.command(epilog=epilog("pick export"))
def export(
    manifest: Manifest,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Of the new manifest, a .parquet file.")],
) -> None:
    """Write a manifest of the clips that were kept.

    Trimmed, and under the captions that people gave them; its other columns are those of MANIFEST. A
    recipe trains on it: data.captions.
    """
    from ..commands.pick import export_picked

    export_picked(manifest=manifest, out=out)
