"""``cinemesh stages``: what is left of a chain, stage after stage; and what is said between two runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import CinemeshError, did_you_mean
from ..train import run as train
from ..training.chain import Link, read_chain
from ..training.sample import run as sample
from ..training.upsampling import UpsampleChoices
from .average import run as average
from .hand_over import hand_over
from .upsample import run as upsample


def run(*, path: Path, nproc: int | None, only: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Do what is left of the chain, stage after stage, or of one stage of it alone.

    Ends as a run of one of its stages ends that does not finish. Raises CinemeshError where there is no such stage, or
    one that it begins with is not done.
    """
    links = {link.stage.name: link for link in read_chain(path, overrides)}
    if only is not None:
        _check_before(links, only, path)
    for number, link in enumerate(links.values(), 1):
        what = f"stage {number} of {len(links)}, {link.stage.name}"
        if only not in (None, link.stage.name):
            continue
        if link.done:
            say(f"{what}: done before")
            continue
        say(f"{what}: {link.directory}")
        if link.stage.is_run and link.stage.after is not None and links[link.stage.after].stage.is_run:
            for line in hand_over(links[link.stage.after].config(), link.config()):
                say(line)
        _do(link, links, nproc)
    if only is None:
        say(f"the chain is done: {', '.join(str(link.directory) for link in links.values())}")


def say(line: str) -> None:
    """Once for all ranks of a job."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _check_before(links: Mapping[str, Link], name: str, path: Path) -> None:
    if name not in links:
        raise CinemeshError(f"the chain {path} has no stage {name!r}", remedy=did_you_mean(name, links))
    for before in links[name].stage.begins_with:
        if not links[before].done:
            raise CinemeshError(
                f"the chain {path}: {name} begins with {before}, which is not done", remedy="do it first"
            )


def _do(link: Link, links: Mapping[str, Link], nproc: int | None) -> None:
    if link.stage.is_run:
        train(config=link.recipe, nproc=nproc, overrides=link.overrides)
    elif link.stage.average:
        average(
            members=[links[name].end() for name in link.stage.average],
            shares=None,
            out=link.end(),
            config=link.recipe,
            greedy=link.stage.greedy,
            overrides=link.overrides,
        )
    elif link.stage.upsample is not None:
        assert link.stage.after is not None and link.made is not None
        upsample(
            checkpoint=str(links[link.stage.after].end()),
            clip=links[link.stage.upsample].clip,
            out=link.clip,
            choices=UpsampleChoices(prompt=link.made.prompt),
            weights=None,
            plan=None,
            device=link.config().device,
            nproc=nproc,
            as_json=False,
        )
    else:
        assert link.stage.prompt is not None and link.stage.after is not None
        sample(
            config=link.recipe,
            prompt=link.stage.prompt,
            checkpoint=links[link.stage.after].end(),
            out=link.clip,
            asked={},
            nproc=nproc,
            overrides=link.overrides,
        )
