"""``cinemesh rewrite``: options and help of its subcommands (torch-free)."""

from pathlib import Path
from typing import Annotated

import typer

from ...ranges import SEED_RANGE, reals
from ..examples import epilog
from ..options import AsJson, bounds
from .judge import PORT_RANGE

HELD_OUT_RANGE = reals(0.0, 0.9, "something must be left to train on", "of the pairs")
RewriterFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Who rewrites, and how: for example configs/rewriting.yaml.")
]

rewrite = typer.Typer(name="rewrite", no_args_is_help=True, rich_markup_mode=None)


@rewrite.callback()
def rewriting() -> None:
    """Write prompts in the words of training captions; teach a small model to do so.

    By a chat model at an endpoint of OpenAI's protocol (its address in CINEMESH_REWRITE_URL, a key in
    CINEMESH_REWRITE_KEY), or one that transformers saved in a directory. cinemesh sample --rewrite does
    the same before it samples.
    """


@rewrite.command(epilog=epilog("rewrite make"))
def make(
    rewriter: RewriterFile,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Print it rewritten.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="YAML list or JSONL of prompts with names, as judge make's."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="For --prompts: a new folder.")] = None,
) -> None:
    """Rewrite prompts.

    What the model answers is held to the rules of the guideline; one that fails them stays as it is, and
    a line says why. The folder holds prompts.yaml, for sample --prompts, and what rewrite serve shows.
    """
    from ..commands.rewrite import run_make

    run_make(rewriter=rewriter, prompt=prompt, prompts=prompts, out=out)


@rewrite.command(epilog=epilog("rewrite serve"))
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What rewrite make wrote.")],
    port: Annotated[int, typer.Option("--port", **bounds(PORT_RANGE), help="0: any that is free.")] = 8322,
) -> None:
    """Serve the page on which people accept, edit or reject rewrites.

    On this machine alone, at 127.0.0.1. An edit is held to the rules, too; a verdict is on the disk before
    the next rewrite; the last verdict on a rewrite counts.
    """
    from ..commands.rewrite import run_serve

    run_serve(folder=folder, port=port)


@rewrite.command(epilog=epilog("rewrite export"))
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What rewrite make wrote, with verdicts.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    held_out: Annotated[
        float, typer.Option("--held-out", **bounds(HELD_OUT_RANGE), help="Share that is never trained on.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", **bounds(SEED_RANGE), help="Draws what is held out.")] = 0,
) -> None:
    """Write accepted and edited rewrites as chats, to fine-tune a student on.

    train.jsonl and held_out.jsonl have a line a pair: messages of system, user and assistant, as TRL's
    SFTTrainer takes them (docs/prompts.md has the recipe).
    """
    from ..commands.rewrite import export_chats

    export_chats(folder=folder, out=out, held_out=held_out, seed=seed)


@rewrite.command(epilog=epilog("rewrite score"))
def score(
    rewriter: RewriterFile,
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS", help="held_out.jsonl, as rewrite export writes it.")],
    as_json: AsJson = False,
) -> None:
    """Say how well a rewriter does on held-out pairs.

    Its first answers, which nothing mends: how many have the form and keep every rule, what of the prompt
    they keep, and how near they come to what people let pass.
    """
    from ..commands.rewrite import run_score

    run_score(rewriter=rewriter, pairs=pairs, as_json=as_json)
