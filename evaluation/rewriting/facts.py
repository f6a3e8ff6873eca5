"""What a prompt says that its rewrite must say, too: quoted texts, numbers, names, and its own words (torch-free)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .guideline import english

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
QUOTED = re.compile(r"[\"“”„«]([^\"“”„«»]+)[\"“”»]")
NUMBER = re.compile(r"[0-9]+(?:[.,:][0-9]+)*")
SENTENCE_END = re.compile(r"[.!?:]\W*$")
POSSESSIVE = re.compile(r"['’]s$")
ENDINGS = ("ing", "ed", "es", "s", "ly")
SHORTEST = 3  # letters that are left of a word without its ending, and of a word that says something


@dataclass(frozen=True)
class Facts:
    """Of a text. ``words``: what is left of each word that says something, without its ending."""

    quoted: frozenset[str]
    numbers: frozenset[str]
    names: frozenset[str]
    words: frozenset[str]

    @classmethod
    def of(cls, text: str) -> Facts:
        """What ``text`` says."""
        quoted = frozenset(" ".join(part.split()) for part in QUOTED.findall(text) if part.strip())
        rest = QUOTED.sub(" ", text)
        numbers = frozenset(NUMBER.findall(rest)) | {
            english().numbers[word] for word in map(str.lower, WORD.findall(rest)) if word in english().numbers
        }
        names = frozenset(_names(rest))
        lowered = {stem(name) for name in names}
        words = frozenset(
            stem(word)
            for word in WORD.findall(rest)
            if len(word) >= SHORTEST
            and word.lower() not in english().common
            and word.lower() not in english().numbers
            and not NUMBER.fullmatch(word)
        )
        return cls(quoted, numbers, names, words - lowered)

    def lost_in(self, text: str) -> list[str]:
        """Quoted texts, numbers and names that ``text`` lacks, as a message has them."""
        other = Facts.of(text)
        plain = " ".join(text.split())
        said = {word.lower() for word in _bare(text)}
        return [
            *(f'"{each}"' for each in sorted(self.quoted) if each not in plain),
            *sorted(self.numbers - other.numbers - set(NUMBER.findall(text))),
            *sorted(name for name in self.names if name.lower() not in said),
        ]

    def kept_share(self, text: str) -> float:
        """How many of the ``words`` are in ``text``, of all; 1 where there are none."""
        return len(self.words & {stem(word) for word in WORD.findall(text)}) / len(self.words) if self.words else 1.0


def stem(word: str) -> str:
    """What is left of a word without its ending, so that ``rides``, ``riding`` and ``ride`` are one."""
    left = POSSESSIVE.sub("", word.lower())
    for ending in ENDINGS:
        if left.endswith(ending) and len(left) - len(ending) >= SHORTEST:
            left = left[: -len(ending)]
            break
    if len(left) > SHORTEST and left[-1] == left[-2]:  # running
        left = left[:-1]
    return left.rstrip("e").removesuffix("i") + "y" if left.endswith("i") else left.rstrip("e")  # cities


def _bare(text: str) -> Iterator[str]:
    return (POSSESSIVE.sub("", word) for word in WORD.findall(text))


def _names(text: str) -> Iterator[str]:
    """Words with a capital where no sentence begins, and those before them; none in a text that is all capitals."""
    found = [(match.start(), POSSESSIVE.sub("", match[0])) for match in WORD.finditer(text)]
    capital = [word[0].isupper() and word != "I" for _, word in found]
    if 2 * sum(capital) > len(found):  # a title, or shouting
        return
    for i, (at, word) in enumerate(found):
        begins = i == 0 or bool(SENTENCE_END.search(text[found[i - 1][0] : at]))
        followed = i + 1 < len(found) and capital[i + 1] and not SENTENCE_END.search(text[at : found[i + 1][0]])
        common = word.lower() in english().common or word.lower() in english().numbers
        if capital[i] and not common and (not begins or followed):
            yield word
