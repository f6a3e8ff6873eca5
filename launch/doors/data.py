"""``cinemesh data``: options and help of its subcommands (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ...kernels.ops import MOST_IDS
from ..examples import epilog
from ..options import AsJson, ConfigFile, LocalProcesses, Overrides

data = typer.Typer(name="data", no_args_is_help=True, rich_markup_mode=None)

CacheFolder = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a latent cache: data.cache of a recipe.")]
VersionName = Annotated[
    str | None,
    typer.Option("--version", metavar="NAME", help="Of the cache, as data show lists it; default: the newest."),
]
SampleId = Annotated[
    int | None,
    typer.Option("--id", min=0, max=MOST_IDS - 1, metavar="N", help="A window, by the number that a run's log tells."),
]


@data.callback()
def datasets() -> None:
    """What is trained on: manifests of clips, the latent cache and its versions, and who was seen when."""


@data.command("index", epilog=epilog("data index"))
def index(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Tars, folders of them, Energon datasets, or Parquet manifests."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The manifest, for data.captions of a recipe.")],
    caption: Annotated[
        str, typer.Option("--caption", metavar="KEY", help="Of a sample's .json, where it has no .txt.")
    ] = "caption",
    split: Annotated[str, typer.Option("--split", help="Of an Energon dataset.")] = "train",
) -> None:
    """Make a manifest of clips that lie in tars, or in files that Parquet tables list; nothing is copied.

    A sample of a tar is what has one key: a video or an image, and its caption in KEY.txt or KEY.json. One
    without a caption is left out, and counted. Tables have the columns file, first_s, last_s, caption, weight.
    """
    from ..commands.data_index import run_index

    run_index(sources=sources, out=out, caption=caption, split=split)


@data.command("build", epilog=epilog("data build"))
def build(
    config: ConfigFile,
    nproc: LocalProcesses = None,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="NAME", help="A version whose ids the new one keeps: rows were added to it."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Build the version of the latent cache that a recipe trains on, and print its name.

    Start it on as many machines as see the folder: each does what nobody else does. What was killed goes on.
    """
    from ..commands.data_build import run_build

    run_build(config=config, nproc=nproc, after=after, overrides=overrides or [])


@data.command("show", epilog=epilog("data show"))
def show(cache: CacheFolder, as_json: AsJson = False) -> None:
    """List the versions of a latent cache, with their rows."""
    from ..commands.data_versions import run_show

    run_show(cache=cache, as_json=as_json)


@data.command("check", epilog=epilog("data check"))
def check(cache: CacheFolder, version: VersionName = None) -> None:
    """Read every row of a version, and compare it with its checksum. Exit code 1: some are damaged."""
    from ..commands.data_versions import run_check

    raise typer.Exit(run_check(cache=cache, version=version))


@data.command("withdraw", epilog=epilog("data withdraw"))
def withdraw(
    cache: CacheFolder,
    clips: Annotated[list[str], typer.Option("--clip", metavar="NAME", help="Give it once for each clip.")],
    version: VersionName = None,
) -> None:
    """Make a version without some clips, and let no run draw them again.

    A run that would still draw one is refused until its recipe says from which step on it draws from a version
    that lacks it. The tars keep the bytes: delete what must be gone from the disk, and build again.
    """
    from ..commands.data_versions import run_withdraw

    run_withdraw(cache=cache, clips=clips, version=version)


@data.command("seen", epilog=epilog("data seen"))
def seen(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="logging.directory of a run.")],
    clip: Annotated[str | None, typer.Option("--clip", metavar="NAME", help="As its captions file names it.")] = None,
    sample_id: SampleId = None,
    as_json: AsJson = False,
) -> None:
    """Tell at which steps a run drew a clip, or one window of it.

    It is computed from the run's newest checkpoint, up to its step, and from the index of its versions.
    """
    from ..commands.data_versions import run_seen

    run_seen(run=run, clip=clip, sample_id=sample_id, as_json=as_json)
