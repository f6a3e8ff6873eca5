"""The funnel: which stage drops a row, in what order, and what is left after each.

    whole       the file is read to its end                 twice      its bytes were there before
    earlier     its video is in no earlier set              length     a piece of a shot that is long enough
    and the stages of ``Limits``; scores are stages of their own, ``score aesthetic``

A row is dropped once, by the first stage that objects, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CinemeshError
from .rows import ClipRow, read_rows
from .settings import CurateSettings, Limits

SCORE = "score"  # and the scorer's name

# In the paper's order (Table 38), ours where they belong; what must be measured before.
NEEDS: dict[str, str] = {
    "whole": "probe",
    "twice": "probe",
    "earlier": "probe",
    "duration": "probe",
    "size": "probe",
    "aspect": "probe",
    "slides": "scan",
    "text": "text",
    "borders": "borders",
    "length": "scan",
    SCORE: "score",
    "static": "scan",
    "motion": "scan",
    "jitter": "scan",
    "copies": "copies",
    "neighbours": "joint",
    "humans": "concept",
    "balance": "probe",
    "resample": "clusters",
}
SETS = ("copies", "neighbours", "humans", "balance", "resample")  # they look at all that is left, and stand last
COSTS = ("probe", "scan", "borders", "score", "text", "copies", "joint", "concept", "clusters")  # from the cheapest
LENGTHS = {"start": "where its video begins", "spare": "another clip of its shot is taken"}


@dataclass(frozen=True)
class FunnelStage:
    """A stage of a run. ``scorer``: which one, of the stage score."""

    kind: str
    scorer: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.scorer}".strip()

    @property
    def needs(self) -> str:
        return NEEDS[self.kind]


def stages(settings: CurateSettings) -> list[FunnelStage]:
    """Those that are on for videos or images, in the order of the run."""
    found: list[FunnelStage] = []
    for kind in NEEDS:
        both = (settings.videos, settings.images)
        if kind == SCORE:
            named = dict.fromkeys(name for keep in both for name, limits in keep.scores.items() if limits is not None)
            found += [FunnelStage(kind, name) for name in named]
        elif kind in ("whole", "twice", "length") or any(getattr(keep, kind) for keep in both):
            found.append(FunnelStage(kind))
    if settings.order == "cheap":
        rows = sorted((each for each in found if each.kind not in SETS), key=lambda each: COSTS.index(each.needs))
        return [*rows, *(each for each in found if each.kind in SETS)]
    return found


def judge_of(stage: FunnelStage, settings: CurateSettings) -> Callable[[ClipRow], str | None]:
    """What a stage that looks at one row says of it: why it is dropped, None: it stays."""
    kinds = {"video": settings.videos, "image": settings.images}
    if stage.kind == "whole":
        return lambda row: row["problem"]
    if stage.kind == "twice":
        return _Twice()
    if stage.kind == "earlier":
        known = {kind: _earlier(keep) for kind, keep in kinds.items()}
        return lambda row: "an earlier set has its video" if row["digest"] in known[row["kind"]] else None
    if stage.kind == "length":
        return lambda row: _length(row, settings.cut.least_s)
    if stage.kind == SCORE:
        return lambda row: _score(row, stage.scorer, kinds[row["kind"]])

    def judge(row: ClipRow) -> str | None:
        rule: Any = getattr(kinds[row["kind"]], stage.kind)
        return None if rule is None else rule.dropped(row)

    return judge


def drop(rows: Sequence[ClipRow], stage: str, reasons: dict[str, str]) -> None:
    """Write down, by id, which rows a stage drops, and why."""
    for row in rows:
        if row["id"] in reasons:
            row["dropped_by"], row["why"] = stage, reasons[row["id"]]


class _Twice:
    """Of files of equal bytes the first one stays."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def __call__(self, row: ClipRow) -> str | None:
        first = self._first.setdefault(row["digest"], row["file"])
        return None if first == row["file"] else f"the same bytes as {first}"


def _earlier(keep: Limits) -> set[str]:
    found: set[str] = set()
    for each in keep.earlier:
        if not Path(each).is_file():
            raise CinemeshError(f"earlier names {each}, which is no file", remedy="name curated.parquet of that set")
        found |= {row["digest"] for row in read_rows(Path(each), ["digest"])}
    return found


def _length(row: ClipRow, least_s: float) -> str | None:
    if row["kind"] == "image" or row["part"] == "clip":
        return None
    return LENGTHS.get(row["part"], f"{row['seconds']:.2f} s of a shot, and a clip has {least_s:g}")


def _score(row: ClipRow, scorer: str, keep: Limits) -> str | None:
    limits = keep.scores.get(scorer)
    if limits is None:
        return None
    wrong = limits.wrong(row[f"score_{scorer}"])
    return None if wrong is None else f"{scorer} {wrong}"
