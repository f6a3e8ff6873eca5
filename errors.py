"""The one error a user can cause: a single message that names the value, the rule and the remedy (torch-free)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CinemeshError(Exception):
    """A mistake in a plan, a config, the data or the environment.

    The message is ``problem; remedy``: what was given and the rule it breaks with its numbers, then what it must be or
    what to do. Commands print it without a traceback and exit with code 2. A bug is an ``assert``, never this.

    Code that acts on an error reads its fields, never its text. ``what``, ``value`` and ``rule`` are filled where a
    table of rules refused: the plan field, or the size of the model or sample, its value, and the rule in words.
    """

    def __init__(self, problem: str, *, remedy: str = "", what: str = "", value: object = None, rule: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy
        self.what, self.value, self.rule = what, value, rule

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


def in_a_line(error: BaseException, *, lines: int | None = None, most: int = 300) -> str:
    """What another library's error says, or its first ``lines`` lines, as one line of ``most`` characters at most."""
    said = " ".join(" ".join(str(error).splitlines()[:lines]).split()) or type(error).__name__
    return said if len(said) <= most else f"{said[:most]}..."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, where one is near, and all that are known."""
    listed = list(known)
    near = difflib.get_close_matches(str(name), listed, n=1)
    return f"did you mean {near[0]!r}? Known: {', '.join(listed)}" if near else f"known: {', '.join(listed)}"
