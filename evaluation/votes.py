"""The key of a judgement, which says what each pair holds, and the votes, which do not (torch-free).

``key.json`` is written once and read only to score; ``votes.jsonl`` grows by a line a vote:
``{"pair": "p0001", "rater": "ann", "axis": "overall", "answer": "left", "reason": "consistency"}``.
A rater who votes again on a pair and axis has changed the vote: the last line counts.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from ..documents import exactly, mapping, quoted, read_json
from ..errors import CinemeshError, did_you_mean
from ..files import atomic_file
from .axes import Axis, Media, axes_of
from .bench import json_lines

KEY_FILE, VOTES_FILE = "key.json", "votes.jsonl"
KEY_FORM = "take the file that judge make wrote"
VOTE_FORM = "each line is a vote with pair, rater, axis, answer and, where the axis has reasons, reason"


class Answer(StrEnum):
    LEFT = "left"
    TIE = "tie"
    RIGHT = "right"


@dataclass(frozen=True)
class ShownPair:
    """Two systems' clips of one prompt.

    No score counts the checks on raters: one system on both sides, so that both clips are the same; or ``repeats``,
    the name of the pair that this one shows again ("": none).
    """

    name: str
    prompt: str
    concept: str
    motion: str
    left: str
    right: str
    repeats: str = ""

    @property
    def identical(self) -> bool:
        return self.left == self.right

    @property
    def scored(self) -> bool:
        return not self.identical and not self.repeats


@dataclass(frozen=True)
class Judgement:
    """``systems``: name -> of how many clips of a prompt each one was picked as the best, 1 where it was the only."""

    media: Media
    axes: list[Axis]
    systems: dict[str, int]
    pairs: dict[str, ShownPair]

    def write(self, path: Path) -> None:
        """The key file. Raises CinemeshError when it cannot be written."""
        values = {
            "media": self.media,
            "axes": [axis.name for axis in self.axes],
            "systems": self.systems,
            "pairs": [asdict(pair) for pair in self.pairs.values()],
        }
        with atomic_file(path) as part:
            part.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Vote:
    pair: str
    rater: str
    axis: str
    answer: Answer
    reason: str = ""

    def line(self) -> str:
        """As the file of votes has it."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_key(path: Path) -> Judgement:
    """The key in a file.

    Raises CinemeshError for one that cannot be read or contradicts itself, and for a prompt twice of two systems.
    """
    what = f"the key {path}"
    values = exactly(
        read_json(path, "the key", KEY_FORM), what, {"media": str, "axes": list, "systems": dict, "pairs": list},
        remedy=KEY_FORM,
    )  # fmt: skip
    if values["media"] not in [*Media]:
        raise CinemeshError(f"{what}: media is {values['media']!r}", remedy=did_you_mean(values["media"], Media))
    media = Media(values["media"])
    for name, picked in values["systems"].items():
        if isinstance(picked, bool) or not isinstance(picked, int) or picked < 1:
            raise CinemeshError(f"{what}: {name} is the best of {quoted(picked)}", remedy="write 1 or more")
    kinds = dict.fromkeys(ShownPair.__dataclass_fields__, str)
    pairs: dict[str, ShownPair] = {}
    seen: dict[tuple[str, frozenset[str]], str] = {}
    for number, row in enumerate(values["pairs"], 1):
        pair = ShownPair(**exactly(row, f"pair {number} of {what}", kinds, remedy=KEY_FORM))
        _check_pair(pair, pairs, values["systems"], what)
        if pair.scored:
            at = (pair.prompt, frozenset((pair.left, pair.right)))
            if (first := seen.setdefault(at, pair.name)) != pair.name:
                raise CinemeshError(
                    f"{what}: pairs {first} and {pair.name} have the same prompt and systems, {quoted(pair.prompt)}, "
                    f"{pair.left} and {pair.right}, and a prompt counts once",
                    remedy=f'remove one, or give it "repeats": "{first}"',
                )
        pairs[pair.name] = pair
    if not seen:
        raise CinemeshError(f"{what} holds no pair of two systems", remedy=KEY_FORM)
    return Judgement(media, axes_of(media, map(str, values["axes"])), values["systems"], pairs)


def _check_pair(pair: ShownPair, before: dict[str, ShownPair], systems: dict[str, int], what: str) -> None:
    if pair.name in before:
        raise CinemeshError(f"{what}: two pairs are named {pair.name!r}", remedy=KEY_FORM)
    for system in (pair.left, pair.right):
        if system not in systems:
            raise CinemeshError(f"{what}: pair {pair.name} is of {system!r}", remedy=did_you_mean(system, systems))
    if pair.repeats:
        of = before.get(pair.repeats)
        if of is None or {of.left, of.right} != {pair.left, pair.right} or of.prompt != pair.prompt:
            raise CinemeshError(
                f"{what}: pair {pair.name} repeats {pair.repeats!r}, no earlier pair of its prompt and systems",
                remedy=KEY_FORM,
            )


def read_votes(path: Path, key: Judgement) -> list[Vote]:
    """The votes of a file, in its order, where a rater's later vote on a pair and axis takes the place of the earlier.

    A last line without its end, which a crash may leave, is no vote. Raises CinemeshError for one that is none of this
    key, and for a file without any.
    """
    found = read_given_votes(path, key.pairs, {axis.name: axis for axis in key.axes})
    if not found:
        raise CinemeshError(f"{path} holds no vote", remedy="cinemesh judge serve takes them")
    return found


def read_given_votes(path: Path, pairs: Container[str], axes: dict[str, Axis]) -> list[Vote]:
    """As ``read_votes``, of a file that may be empty and without a key: pairs and axes by name are enough."""
    found: dict[tuple[str, str, str], Vote] = {}
    for row, where in json_lines(path, "the votes", VOTE_FORM, grows=True):
        vote = vote_of(row, where, pairs, axes)
        found[vote.pair, vote.rater, vote.axis] = vote
    return [*found.values()]


def vote_of(row: object, where: str, pairs: Container[str], axes: dict[str, Axis]) -> Vote:
    """A vote as JSON has it, on one of ``pairs`` and ``axes`` by name. Raises CinemeshError for anything else."""
    given = mapping(row, where, Vote.__dataclass_fields__, required=["pair", "rater", "axis", "answer"])
    for name, value in given.items():
        if not isinstance(value, str) or (name == "rater" and not value.strip()):
            raise CinemeshError(f"{where}: {name} is {quoted(value)}", remedy="it must be a text")
    vote = Vote(**given)
    if vote.pair not in pairs:
        raise CinemeshError(f"{where}: {quoted(vote.pair)} is no pair of the key", remedy="take these votes' key")
    if vote.axis not in axes:
        raise CinemeshError(f"{where}: axis {quoted(vote.axis)} is not the key's", remedy=did_you_mean(vote.axis, axes))
    if vote.answer not in [*Answer]:
        raise CinemeshError(f"{where}: answer is {quoted(vote.answer)}", remedy=did_you_mean(vote.answer, Answer))
    if vote.reason and vote.reason not in axes[vote.axis].reasons:
        raise CinemeshError(
            f"{where}: {quoted(vote.reason)} is no reason of {vote.axis}",
            remedy=f"known: {', '.join(axes[vote.axis].reasons) or 'none'}",
        )
    return Vote(**given | {"answer": Answer(vote.answer)})
