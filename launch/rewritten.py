"""Prompts that a command rewrites before its work, and what it says of them (torch-free)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from .progress import progress

if TYPE_CHECKING:
    from ..evaluation.rewriting.guideline import Guideline
    from ..evaluation.rewriting.rewriter import Rewriter, Rewritten


def read_rewriter(path: Path) -> Rewriter:
    """The rewriter of a file as ``configs/rewriting.yaml``. Raises CinemeshError."""
    from ..evaluation.rewriting.rewriter import Rewriter
    from ..evaluation.rewriting.settings import read_settings

    return Rewriter(read_settings(path))


def rewrite_all(rewriter: Rewriter, prompts: Mapping[str, str]) -> dict[str, Rewritten]:
    """Each prompt by name; says of one that stays as it is why, and how many were rewritten."""
    found: dict[str, Rewritten] = {}
    with progress("rewriting", len(prompts)) as begin:
        for name, prompt in prompts.items():
            begin(name)
            found[name] = one = rewriter.rewrite(prompt)
            if one.parts is None:
                print(f"{name} is NOT rewritten, and taken as it is: {one.problem}", file=sys.stderr)
    done = [one for one in found.values() if one.parts is not None]
    kept = sum(one.cached for one in done)
    print(f"rewritten: {len(done)} of {len(found)} prompts, {kept} of them before", file=sys.stderr)
    return found


def write_prompts(path: Path, found: Mapping[str, Rewritten]) -> None:
    """A file of prompts, each as it is sampled, beside those that are there already. Raises CinemeshError."""
    from ..documents import write_yaml
    from ..evaluation.bench import read_prompts
    from ..files import atomic_file

    before = {each.name: each.prompt for each in read_prompts(path)} if path.exists() else {}
    texts = before | {name: one.text for name, one in found.items()}
    with atomic_file(path) as unfinished:
        rows = [{"name": name, "prompt": text} for name, text in texts.items()]
        unfinished.write_text(write_yaml(rows, width=120), encoding="utf-8")


def unlike(guideline: Guideline, captions: list[str]) -> str:
    """What to say where rewritten prompts will not be as long as the captions of training, "" where they will."""
    from ..evaluation.rewriting.guideline import words_in

    counts = words_in(captions)
    least, most = guideline.words
    if not counts or least <= median(counts) <= most:
        return ""
    return (
        f"rewritten prompts have {least} to {most} words, and the recipe's captions {min(counts)} to {max(counts)}: "
        "take a guideline of that length"
    )
