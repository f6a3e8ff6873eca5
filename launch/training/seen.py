"""Which steps of a run drew a clip: by what its newest checkpoint says of the order, and the index of its versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.cache.drawn import Drawn, RunOrder
from ...data.cache.history import History
from ...data.cache.index import Index, is_any_of
from ...data.cache.version import VersionChange
from ...errors import CinemeshError
from ...reading import read_record
from .checkpoint.choosing import FOLDER, latest
from .checkpoint.manifest import read_manifest

SEEN = "drawn"  # of a checkpoint's note


@dataclass(frozen=True)
class DrawnFrom:
    """What a checkpoint keeps of it."""

    place: str
    changes: tuple[VersionChange, ...]
    order: RunOrder

    @classmethod
    def of(cls, history: History, order: RunOrder) -> DrawnFrom:
        return cls(history.place, tuple(VersionChange(d.step, d.cache.name) for d in history.draws), order)

    def told(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SeenIn:
    """Steps, from 1 on, that drew a clip from a bucket of a version; ``rows`` of it are there."""

    version: str
    bucket: str
    ids: list[int]
    rows: int
    steps: list[int]


def seen(run: Path, *, clip: str | None = None, sample_id: int | None = None) -> tuple[int, list[SeenIn]]:
    """To which step a run's newest checkpoint is, and where and when it drew a clip, or one window of it.

    Raises CinemeshError for a run without a checkpoint, and for a clip that none of its versions has.
    """
    newest = latest(run / FOLDER)
    if newest is None:
        raise CinemeshError(f"no checkpoint in {run / FOLDER}", remedy="name the directory of a run: logging.directory")
    found = read_manifest(newest)
    told = drawn_from(found.note, newest)
    history = History.open(told.place, told.changes)
    drawn = Drawn(told.order, history)
    where: list[SeenIn] = []
    for number, draws in enumerate(history.draws):
        for bucket, rows in enumerate(draws.cache.version.buckets):
            index = Index(draws.cache.storage, rows.train)
            places, ids = _rows(index, clip, sample_id)
            if places:
                steps = drawn.steps_of(number, bucket, places, found.step)
                one = [step + 1 for step in steps]
                where.append(SeenIn(draws.cache.name, rows.bucket, sorted({*ids}), len(places), one))
    if not where:
        what = f"clip {clip!r}" if clip is not None else f"sample {sample_id}"
        raise CinemeshError(
            f"no version that {run} draws from has a training row of {what}",
            remedy="name a clip as its captions file or manifest does, or a sample by its number",
        )
    return found.step, where


def drawn_from(note: Mapping[str, Any], checkpoint: Path) -> DrawnFrom:
    """Raises CinemeshError for a checkpoint that does not say."""
    if SEEN not in note:
        raise CinemeshError(
            f"checkpoint {checkpoint} is of an earlier release and does not say what its run drew",
            remedy="go on with that run once, and ask again",
        )
    return read_record(DrawnFrom, note[SEEN], f"checkpoint {checkpoint}: {SEEN}")


def _rows(index: Index, clip: str | None, sample_id: int | None) -> tuple[list[int], list[int]]:
    """Places and ids of the rows of a clip, or of a sample."""
    places: list[int] = []
    ids: list[int] = []
    first = 0
    for table in index.columns("id", "clip"):
        column, wanted = ("clip", clip) if clip is not None else ("id", sample_id)
        held = np.flatnonzero(is_any_of(table.column(column), [wanted]))
        places += [first + at for at in held.tolist()]
        ids += table.column("id").take(held).to_pylist()
        first += table.num_rows
    return places, ids
