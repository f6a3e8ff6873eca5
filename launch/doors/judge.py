"""``cinemesh judge``: options and help of its subcommands (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ...ranges import SEED_RANGE, integers, reals
from ..examples import epilog
from ..options import AsJson, bounds

DEVIATION_RANGE = reals(0.01, 100.0, "a net win lies within 100 points, and millions of prompts come to 0.1", "points")
SHARE_RANGE = reals(0.0, 1.0, "a share of the pairs")
PORT_RANGE = integers(0, 65535, "ports have 16 bits")

judge = typer.Typer(name="judge", no_args_is_help=True, rich_markup_mode=None)


@judge.callback()
def judging() -> None:
    """Let people compare clips or images of two or more systems, without knowing which is which."""


@judge.command(epilog=epilog("judge make"))
def make(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER FOLDER ...", help="Of each system: one clip or image a prompt.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, for the pairs.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="YAML list or JSONL, of prompt, name, concept, motion; a file is called after its prompt's name. "
            "Default: the 30 that ship.",
        ),
    ] = None,
    axes: Annotated[
        list[str] | None, typer.Option("--axis", metavar="NAME", help="To be asked; may be repeated. Default: all.")
    ] = None,
    best_of: Annotated[
        list[str] | None,
        typer.Option("--best-of", metavar="SYSTEM=N", help="That its clips are picks of N; may be repeated."),
    ] = None,
    identical: Annotated[
        float, typer.Option("--identical", **bounds(SHARE_RANGE), help="Share of pairs that show one clip twice.")
    ] = 0.05,
    repeated: Annotated[
        float, typer.Option("--repeated", **bounds(SHARE_RANGE), help="Share of pairs that come again.")
    ] = 0.05,
    seed: Annotated[int, typer.Option("--seed", **bounds(SEED_RANGE), help="Draws sides, order and checks.")] = 0,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            metavar="DIR",
            help="Of the guideline: examples.yaml, a list of axis, better, worse, prompt and why, and the files.",
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Bring two files that differ to one form: cropped around the centre, cut, at the lower rate."
        ),
    ] = False,
) -> None:
    """Make blinded pairs of two or more systems' clips or images.

    A system is called after its folder. Both sides of a pair have one size, length and rate: others are
    refused by name, or brought together with --fit. Sides are drawn, each system left in half of its
    pairs; which is which stands in key.json alone. Needs no GPU, and no torch without --fit.
    """
    from ...evaluation.blinding import Draw
    from ..commands.judge_make import run

    draw = Draw(seed=seed, identical=identical, repeated=repeated)
    run(
        folders=folders,
        prompts=prompts,
        out=out,
        axes=axes or [],
        best_of=best_of or [],
        draw=draw,
        fitted=fit,
        examples=examples,
    )


@judge.command(epilog=epilog("judge serve"))
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What judge make wrote.")],
    port: Annotated[int, typer.Option("--port", **bounds(PORT_RANGE), help="0: any that is free.")] = 8321,
) -> None:
    """Serve the page on which people judge the pairs.

    On this machine alone, at 127.0.0.1: a player for both clips in step, keys for answers and reasons, a
    guideline. A vote is on the disk before the next question; a reload goes on where it was. Raters may
    vote at once, each under a name. Needs no GPU and no torch.
    """
    from ..commands.judge_serve import run

    run(folder=folder, port=port)


@judge.command(epilog=epilog("judge score"))
def score(
    votes: Annotated[Path, typer.Argument(metavar="VOTES", help="votes.jsonl, as judge serve writes it.")],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="What each pair holds; default: key.json beside them.")
    ] = None,
    deviation: Annotated[
        float,
        typer.Option(
            "--deviation", **bounds(DEVIATION_RANGE), help="Points, for the number of prompts that are still needed."
        ),
    ] = 2.5,
    losses: Annotated[
        list[str] | None,
        typer.Option(
            "--loss", metavar="SYSTEM=LOSS", help="Its validation loss, to compare with net wins; may be repeated."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw losses against net wins; needs --loss.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what the votes say of the systems.

    For every axis and two systems: prompts won and lost by the majority of their votes, the net win
    rate with its interval, the raters' side bias and agreement, and how many prompts are still needed.
    Of more than two systems also ratings. A rater who presses one side whatever is shown is left out,
    by name. With --loss also whether the system with the lower validation loss is preferred (Movie Gen,
    Fig. 15). Needs no GPU and no torch.
    """
    from ..commands.judge_score import run

    run(votes=votes, key=key, deviation=deviation, losses=losses or [], plot=plot, as_json=as_json)


@judge.command("export", epilog=epilog("judge export"))
def export_tasks(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What judge make wrote.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    clips_at: Annotated[
        str | None,
        typer.Option(
            "--clips-at",
            metavar="URL",
            help="Where clips/ is served. Default: among Label Studio's local files, of the folder that holds DIR.",
        ),
    ] = None,
) -> None:
    """Write pairs for Label Studio: tasks.json to import, interface.xml for the project's settings.

    A task is a pair on an axis, and names no system. Needs no GPU and no torch.
    """
    from ..commands.judge_label_studio import export_for_label_studio

    export_for_label_studio(folder=folder, out=out, clips_at=clips_at)


@judge.command("import", epilog=epilog("judge import"))
def import_votes(
    exported: Annotated[Path, typer.Argument(metavar="JSON", help="What Label Studio exported, as JSON.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What judge make wrote: its votes are added to.")],
) -> None:
    """Add the votes of Label Studio's annotators to those of a folder of pairs.

    All of them or, where one is wrong, none. Votes that are there already stand; of one rater, pair and
    axis the later counts. Needs no GPU and no torch.
    """
    from ..commands.judge_label_studio import import_from_label_studio

    import_from_label_studio(exported=exported, folder=folder)
