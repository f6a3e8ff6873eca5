"""How well a rewriter does on held-out pairs: form, rules, what is kept, and how near to what people let pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import CinemeshError
from .endpoint import Unreached
from .facts import WORD, Facts, stem
from .review import TaughtPair
from .rewriter import Rewriter
from .rules import broken_rules, read_answer


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """Shares of all ``prompts``, of the first answers, which nothing mends.

    ``schema``: are the JSON object that was asked for. ``passed``: break no rule. ``facts_kept``: have every quoted
    text, number and name. ``words_kept``, ``overlap``: means of the prompt's words that stay, and of the F1 of words
    with the rewrite that people let pass; 0 of an answer without form. ``broken``: rule -> answers that break it.
    """

    prompts: int
    schema: float
    passed: float
    facts_kept: float
    words_kept: float
    overlap: float
    broken: dict[str, int]
    problems: dict[str, str]


def score_rewriter(rewriter: Rewriter, pairs: Sequence[TaughtPair], begin: Callable[[str], None]) -> HeldOutScore:
    """Ask for every prompt once. ``begin`` is told of each. Raises CinemeshError where nobody answers."""
    schema = passed = facts = 0
    words = overlap = 0.0
    broken: Counter[str] = Counter()
    problems: dict[str, str] = {}
    for number, pair in enumerate(pairs, 1):
        begin(f"prompt {number}")
        try:
            parts = read_answer(rewriter.answer(pair.prompt), rewriter.guideline)
        except Unreached:
            raise
        except CinemeshError as error:
            broken["form"] += 1
            problems[pair.prompt] = error.problem
            continue
        schema += 1
        said = Facts.of(pair.prompt)
        facts += not said.lost_in(parts.text)
        words += said.kept_share(parts.text)
        overlap += f1(parts.text, pair.parts.text)
        wrong = broken_rules(pair.prompt, parts, rewriter.guideline)
        broken.update(wrong.keys())
        passed += not wrong
        if wrong:
            problems[pair.prompt] = "; ".join(wrong.values())
    n = len(pairs)
    return HeldOutScore(
        prompts=n, schema=schema / n, passed=passed / n, facts_kept=facts / n, words_kept=words / n,
        overlap=overlap / n, broken=dict(broken), problems=problems,
    )  # fmt: skip


def f1(text: str, other: str) -> float:
    """Of the words of two texts, each without its ending: twice what they share, of all."""
    one, two = (Counter(stem(word) for word in WORD.findall(each)) for each in (text, other))
    return 2 * (one & two).total() / max(1, one.total() + two.total())
