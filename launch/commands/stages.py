"""``cinemesh stages``: what is left of a chain, stage after stage; and what is said between two runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..train import run as train
from ..training.chain import Link, read_chain
from ..training.sample import run as sample
from .average import run as average
from .hand_over import hand_over


def run(*, path: Path, nproc: int | None, overrides: Sequence[str] = ()) -> None:
    """Do what is left of the chain, stage after stage. Ends as a run of one of its stages ends that does not finish."""
    links = {link.stage.name: link for link in read_chain(path, overrides)}
    for number, link in enumerate(links.values(), 1):
        what = f"stage {number} of {len(links)}, {link.stage.name}"
        if link.done:
            print(f"{what}: done before", file=sys.stderr)
            continue
        print(f"{what}: {link.directory}", file=sys.stderr)
        if link.is_run and link.stage.after is not None and links[link.stage.after].is_run:
            for line in hand_over(links[link.stage.after].config(), link.config()):
                print(line, file=sys.stderr)
        _do(link, links, nproc)
    print(f"the chain is done: {', '.join(str(link.directory) for link in links.values())}", file=sys.stderr)


def _do(link: Link, links: Mapping[str, Link], nproc: int | None) -> None:
    if link.is_run:
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
