"""``cinemesh codec``: options and help of its subcommands (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ..examples import epilog
from ..options import AsJson, Overrides

codec = typer.Typer(name="codec", no_args_is_help=True, rich_markup_mode=None)

Recipe = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", show_default=False, help="Recipe of the clips. Default: the quick start."),
]


@codec.callback()
def codecs() -> None:
    """What turns clips into latents and back: how well it does, and a decoder fitted to clips."""


@codec.command("eval", epilog=epilog("codec eval"))
def evaluate(
    config: Recipe = None,
    named: Annotated[
        str | None,
        typer.Option(
            "--codec",
            metavar="NAME|PATH",
            help="A kind, what codec fit wrote, or a folder of tae train or diffusers. Default: the recipe's.",
        ),
    ] = None,
    frechet: Annotated[
        bool,
        typer.Option(
            "--frechet",
            help="Also the Frechet distance of features of EfficientNet-lite0, which is no FID and no FVD. Needs the "
            "extra tae.",
        ),
    ] = False,
    unseen: Annotated[
        bool,
        typer.Option("--unseen", help="The codec was trained on none of these clips: all windows, not the held-out."),
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Encode and decode held-out windows, and measure what is lost.

    PSNR and SSIM are means over scenes, each the mean of its windows; of an image: the first frame of
    a window as a clip of one frame. The clips are decoded, and no cache is read or written. A scene of
    less than two windows holds none out: whole clips that no training saw are measured with --unseen.
    """
    from ..commands.codec import run_eval

    run_eval(config=config, named=named, overrides=overrides or [], as_json=as_json, frechet=frechet, unseen=unseen)


@codec.command("fit", epilog=epilog("codec fit"))
def fit(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The decoder, for codec.decoder of a recipe.")],
    config: Recipe = None,
    overrides: Overrides = None,
) -> None:
    """Fit the decoder of dct-context to a recipe's training windows, by least squares.

    Every scene counts the same. Windows that overlap say little anew: --set data.stride=4 takes fewer.
    """
    from ..commands.codec import run_fit

    run_fit(config=config, overrides=overrides or [], out=out)
