"""``cinemesh tae``: options and help of its subcommands (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ..examples import epilog
from ..options import LocalProcesses, OnDevice, Overrides, RecipeDevice

tae = typer.Typer(name="tae", no_args_is_help=True, rich_markup_mode=None)


@tae.callback()
def temporal_autoencoder() -> None:
    """The temporal autoencoder, which makes the latents of a video model: trained, and run over clips."""


@tae.command("train", epilog=epilog("tae train"))
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML recipe, for example configs/tae/quickstart.yaml.")
    ],
    nproc: LocalProcesses = None,
    device: RecipeDevice = None,
    overrides: Overrides = None,
) -> None:
    """Train an autoencoder, or resume its training.

    Data parallel: the weights are those of one process, whatever --nproc. Started again, a run goes on
    from its newest whole checkpoint, bit by bit. When it is done, its directory holds a folder
    autoencoder, which is a codec: for codec eval, tae encode, and codec.path of a recipe. docs/tae.md
    tells the keys of a recipe.
    """
    from ..plans import device_override
    from ..tae.loop import run
    from ..tae.recipe import read_tae_recipe

    run(recipe=read_tae_recipe(config, [*device_override(device), *(overrides or [])]), nproc=nproc)


@tae.command("encode", epilog=epilog("tae encode"))
def encode(
    autoencoder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder autoencoder of a run of tae train.")],
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML recipe whose clips, scenes and buckets are taken.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A safetensors file: a latent of every window.")],
    decoded: Annotated[
        Path | None, typer.Option("--decoded", metavar="DIR", help="Also write each window again, decoded, as mp4.")
    ] = None,
    nproc: LocalProcesses = None,
    device: OnDevice = "auto",
    overrides: Overrides = None,
) -> None:
    """Encode the windows of a recipe's clips, each at whatever length it has.

    Tile by tile, 32 frames at a time, in constant memory; decoded with 16 frames that overlap. With --nproc
    the tiles of a window are spread over processes, and latents and clips are those of one, bit by bit,
    where each has as many threads. Latents are standardised, float32 [C, t, h, w], one a window.
    """
    from ..tae.encode import run

    run(autoencoder, config=config, out=out, decoded=decoded, nproc=nproc, device=device, overrides=overrides or [])
