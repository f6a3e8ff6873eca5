"""The axes on which raters compare two clips or images, as ``axes.yaml`` says them (torch-free)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

from ..documents import exactly, read_yaml
from ..errors import CinemeshError, did_you_mean

AXES_FILE = Path(__file__).parent / "axes.yaml"
BROKEN = "it ships with cinemesh: install it anew"


class Media(StrEnum):
    VIDEO = "video"
    IMAGE = "image"


@dataclass(frozen=True)
class Axis:
    """One question. ``raters``: votes that a pair wants on it; ``reasons``: name -> what a rater reads."""

    name: str
    media: Media
    raters: int
    question: str
    guideline: str
    reasons: dict[str, str]


@cache
def all_axes() -> dict[str, Axis]:
    """Every axis by name, in the order in which they are asked."""
    kinds = {"name": str, "media": str, "raters": int, "question": str, "guideline": str, "reasons": dict}
    rows = read_yaml(AXES_FILE, "the list of axes", BROKEN)
    read = [exactly(row, f"axis {number} of {AXES_FILE}", kinds, remedy=BROKEN) for number, row in enumerate(rows, 1)]
    return {row["name"]: Axis(**{**row, "media": Media(row["media"])}) for row in read}


def axes_of(media: Media, names: Iterable[str] = ()) -> list[Axis]:
    """The axes of ``names``, in the order in which they are asked; all of that media where none is named.

    Raises CinemeshError for a name that is no axis of this media.
    """
    known = {name: axis for name, axis in all_axes().items() if axis.media is media}
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise CinemeshError(f"{name!r} is no axis of a pair of {media}s", remedy=did_you_mean(name, known))
    return [axis for name, axis in known.items() if name in wanted or not wanted]
