"""What clips show, in words: the nearest of some hundred human verbs and expressions, by a joint embedder.

The paper retrieves clips by 600 of them, and has people in 60 % of its high-resolution sets and more. Its list is not
published; ``verbs.yaml`` is ours, and ``measure.verbs`` names another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa

from ...documents import read_yaml
from ...errors import CinemeshError
from ...ranges import SEED_RANGE, check_ranges, reals
from .copies import Cosine
from .embedders import EmbedderSettings
from .rows import ClipRow, draw_of, titled

VERBS = Path(__file__).parent / "verbs.yaml"
ASKED = "a person {}"
PeopleShare = Annotated[float, reals(0.01, 1, "a share of the clips")]


@dataclass(frozen=True)
class ConceptMeasure:
    """Of every clip, from its vector of the joint embedder."""

    embedder: EmbedderSettings
    weights: str
    verbs: tuple[str, ...]

    name: ClassVar[str] = "concept"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("joint",)
    unit: ClassVar[int] = 256
    columns: ClassVar[tuple[pa.Field, ...]] = (
        titled("concept", pa.string(), "the verb or expression that is nearest"),
        titled("concept_cosine", pa.float32(), "of the clip and that text"),
    )

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        texts = self.embedder.build().texts([ASKED.format(verb) for verb in self.verbs])
        made: list[ClipRow] = []
        for row in rows:
            cosines = texts @ np.array(row["vector"], np.float32)
            best = int(cosines.argmax())
            made.append({"id": row["id"], "concept": self.verbs[best], "concept_cosine": float(cosines[best])})
        return made


@dataclass(frozen=True)
class Humans:
    """At least ``least_share`` of the clips show people, those with a verb of ``cosine``: others go, drawn."""

    least_share: PeopleShare = 0.6
    cosine: Cosine = 0.2
    seed: Annotated[int, SEED_RANGE] = 0

    needs: ClassVar[str] = "concept"

    def __post_init__(self) -> None:
        check_ranges(self, "humans.")

    def dropped(self, rows: Sequence[ClipRow]) -> dict[str, str]:
        """By id, of those without people that are too many."""
        people = sum(row["concept_cosine"] >= self.cosine for row in rows)
        others = [row for row in rows if row["concept_cosine"] < self.cosine]
        return thinned(others, math.floor(people / self.least_share - people), self.seed, "nobody is seen in it")


def thinned(rows: Sequence[ClipRow], most: int, seed: int, why: str) -> dict[str, str]:
    """By id, all but ``most`` of the rows, drawn by chance."""
    order = sorted(rows, key=lambda row: draw_of(seed, "thinned", row["id"]))
    return {row["id"]: f"{why}, and such clips are {len(rows)} where {most} may be" for row in order[most:]}


def read_verbs(path: Path) -> tuple[str, ...]:
    """A YAML list of texts. Raises CinemeshError."""
    listed = read_yaml(path, "the list of verbs", "correct measure.verbs")
    if not isinstance(listed, list) or not listed or not all(isinstance(each, str) and each.strip() for each in listed):
        raise CinemeshError(f"{path} is no list of verbs", remedy="write one text a line: - walking")
    return tuple(dict.fromkeys(listed))
