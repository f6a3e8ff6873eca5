"""Raters whose preference and side bias are known, and keys and files of votes for them."""

from __future__ import annotations

import json
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cinemesh.evaluation.axes import Media, axes_of
from cinemesh.evaluation.net_win import majority
from cinemesh.evaluation.votes import KEY_FILE, VOTES_FILE, Answer, Judgement, ShownPair, Vote

TIED = 0.1  # of honest votes, on every prompt
EDGE = 0.1  # least probability of either preference, so that every prompt leaves room for such a side bias


def preferences(mean: float, prompts: int, random: np.random.Generator) -> NDArray[np.floating]:
    """[prompts, 3]: probabilities that an honest rater prefers the first, neither, the second; prompts differ."""
    share = random.beta(6 * mean, 6 * (1 - mean), prompts)
    first = EDGE + (1 - TIED - 2 * EDGE) * share
    return np.column_stack([first, np.full(prompts, TIED), 1 - TIED - first])


def honest_net_win(of: NDArray[np.floating], raters: int) -> NDArray[np.floating]:
    """[prompts]: the expected majority of raters without bias, summed over all outcomes."""
    total = np.zeros(len(of))
    for first, tie in product(range(raters + 1), repeat=2):
        second = raters - first - tie
        if second >= 0:
            ways = comb(raters, first) * comb(raters - first, tie)
            total += majority(first, tie, second) * ways * of[:, 0] ** first * of[:, 1] ** tie * of[:, 2] ** second
    return total


def vote(
    of: NDArray[np.floating], bias: float, raters: int, random: np.random.Generator
) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """Votes [prompts, 3] and whether the first system stood left: in half of the prompts."""
    left = random.permutation(len(of)) < len(of) // 2
    shift = np.where(left, bias, -bias)
    return random.multinomial(raters, of + np.column_stack([shift, np.zeros(len(of)), -shift])), left


def key_of(prompts: int = 4, systems: tuple[str, ...] = ("new", "old"), *, checks: bool = True) -> Judgement:
    """Every two systems on every prompt, sides in turn, one identical and one repeated pair of the first two."""
    pairs = []
    for i, one in enumerate(systems):
        for other in systems[i + 1 :]:
            for n in range(prompts):
                sides = (one, other) if n % 2 else (other, one)
                motion = ("low", "high")[n % 2]
                pairs.append(ShownPair(f"p{len(pairs)}", f"prompt {n}", "human", motion, *sides))
    if checks:
        first = pairs[0]
        pairs.append(ShownPair("same", "prompt 0", "human", "low", systems[0], systems[0]))
        pairs.append(ShownPair("again", "prompt 0", "human", "low", first.right, first.left, repeats=first.name))
    return Judgement(Media.VIDEO, axes_of(Media.VIDEO), dict.fromkeys(systems, 1), {pair.name: pair for pair in pairs})


def votes_for(
    key: Judgement, system: str, axis: str = "overall", raters: tuple[str, ...] = ("a", "b", "c")
) -> list[Vote]:
    """Every rater prefers ``system`` wherever it stands, and neither where it does not."""
    answers = {
        pair.name: Answer.TIE if pair.identical else Answer.LEFT if pair.left == system else Answer.RIGHT
        for pair in key.pairs.values()
    }
    return [Vote(name, rater, axis, answer) for rater in raters for name, answer in answers.items()]


def written(folder: Path, key: Judgement, votes: list[Vote]) -> Path:
    """The file of votes, with its key beside it."""
    key.write(folder / KEY_FILE)
    path = folder / VOTES_FILE
    path.write_text("".join(each.line() for each in votes))
    return path


def changed_key(folder: Path, **changes: object) -> Path:
    """The key in ``folder`` with other values."""
    path = folder / KEY_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path
