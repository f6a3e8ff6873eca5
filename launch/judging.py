"""``cinemesh judge``: options and help of its subcommands (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ..ranges import reals
from .examples import epilog
from .options import AsJson, bounds

DEVIATION_RANGE = reals(0.01, 100.0, "a net win lies within 100 points, and millions of prompts come to 0.1", "points")

judge = typer.Typer(name="judge", no_args_is_help=True, rich_markup_mode=None)


@judge.callback()
def judging() -> None:
    """Let people compare clips or images of two or more systems, without knowing which is which."""


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
    as_json: AsJson = False,
) -> None:
    """Print what the votes say of the systems.

    For every axis and two systems: prompts won and lost by the majority of their votes, the net win
    rate with its interval, the raters' side bias and agreement, and how many prompts are still needed.
    Of more than two systems also ratings. A rater who presses one side whatever is shown is left out,
    by name. Needs no GPU and no torch.
    """
    from .commands.judge_score import run

    run(votes=votes, key=key, deviation=deviation, as_json=as_json)
