"""What the votes say of those who gave them: agreement, and an audit of every rater (torch-free).

The audit leaves out, by name, who presses one side whatever is shown: it decided ``FEWEST_DECIDED`` times or more,
with ``ONE_SIDED`` or more of them on one side. Sides are drawn by chance, so an honest rater's share is near a half:
20 of 20 flips of a coin fall to one side once in 500,000 raters, 18 or more of 20 once in 2,500. All else is noted, and
the votes count.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .votes import Answer, Judgement, ShownPair, Vote

FEWEST_DECIDED = 20  # votes that are no tie
ONE_SIDED = 0.9  # of them on one side
LEANING = 1e-3  # probability of so uneven sides by chance, below which it is noted
FEWEST_CHECKS = 4  # votes on identical, or repeated, pairs
FAILED = 0.5  # of them, above which it is noted


@dataclass(frozen=True, kw_only=True)
class Rater:
    """Of one rater.

    ``left`` of the ``decided`` votes, ties apart; ``preferred``: votes for one of two ``identical`` clips;
    ``changed``: votes on ``repeated`` pairs that differ from the first time. ``left_out``: why none of the votes
    counts, "" where they do; ``notes``: what to look at.
    """

    name: str
    votes: int
    decided: int
    left: int
    identical: int
    preferred: int
    repeated: int
    changed: int
    left_out: str
    notes: list[str]


def preferred_system(vote: Vote, pair: ShownPair) -> str:
    """The system that a vote is for, "" for a tie."""
    return {Answer.LEFT: pair.left, Answer.RIGHT: pair.right, Answer.TIE: ""}[vote.answer]


def audit(votes: Iterable[Vote], key: Judgement) -> list[Rater]:
    """Every rater, by name."""
    by_rater: defaultdict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote)
    return [_audited(name, by_rater[name], key) for name in sorted(by_rater)]


def _audited(name: str, votes: list[Vote], key: Judgement) -> Rater:
    given = {(vote.pair, vote.axis): vote for vote in votes}
    answers = Counter(vote.answer for vote in votes)
    left, decided = answers[Answer.LEFT], answers[Answer.LEFT] + answers[Answer.RIGHT]
    identical = [vote for vote in votes if key.pairs[vote.pair].identical]
    preferred = sum(vote.answer is not Answer.TIE for vote in identical)
    again = []
    for vote in votes:
        pair = key.pairs[vote.pair]
        if pair.repeats and (first := given.get((pair.repeats, vote.axis))):
            again.append(preferred_system(vote, pair) != preferred_system(first, key.pairs[first.pair]))
    side, most = ("left", left) if 2 * left >= decided else ("right", decided - left)
    left_out, notes = "", []
    if decided >= FEWEST_DECIDED and most >= ONE_SIDED * decided:
        left_out = f"presses {side} whatever is shown: {most} of {decided} decided votes"
    elif decided and two_sided(left, decided) < LEANING:
        notes.append(f"leans to the {side}: {most} of {decided} decided votes")
    if len(identical) >= FEWEST_CHECKS and preferred > FAILED * len(identical):
        notes.append(f"prefers one of two identical clips: {preferred} of {len(identical)} times")
    if len(again) >= FEWEST_CHECKS and sum(again) > FAILED * len(again):
        notes.append(f"votes otherwise when a pair comes again: {sum(again)} of {len(again)} times")
    return Rater(
        name=name,
        votes=len(votes),
        decided=decided,
        left=left,
        identical=len(identical),
        preferred=preferred,
        repeated=len(again),
        changed=sum(again),
        left_out=left_out,
        notes=notes,
    )


def two_sided(left: int, decided: int) -> float:
    """The probability that ``decided`` flips of a coin fall as unevenly, or more so."""
    whole = math.lgamma(decided + 1) - decided * math.log(2)
    terms = (whole - math.lgamma(k + 1) - math.lgamma(decided - k + 1) for k in range(min(left, decided - left) + 1))
    return min(1.0, 2 * sum(map(math.exp, terms)))


def alpha(units: Iterable[Mapping[str, int]]) -> float | None:
    """Krippendorff's alpha for names: 1 where raters agree, 0 where they do as by chance, below where they do less.

    ``units``: of each thing judged, how many raters gave each answer; those with less than two count not at all. None
    where no two answers can be compared, or all are the same (Krippendorff, Computing Krippendorff's Alpha, 2011).
    """
    totals: Counter[str] = Counter()
    differ = 0.0
    for counts in units:
        raters = sum(counts.values())
        if raters > 1:
            totals.update(counts)
            differ += (raters**2 - sum(count**2 for count in counts.values())) / (raters - 1)
    n = sum(totals.values())
    expected = n**2 - sum(count**2 for count in totals.values())
    return 1 - (n - 1) * differ / expected if expected else None
