"""Which version of the cache each step of a run draws from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...errors import CinemeshError
from .held import HeldBlocks
from .samples import Cache
from .storage import is_url
from .version import VersionChange, history_text, version_names, withdrawn

MOST_TOLD = 3  # clips in a message


@dataclass(frozen=True)
class Draws:
    """From step ``step`` on, until the next change, a run draws from ``cache``."""

    step: int
    cache: Cache


@dataclass(frozen=True)
class History:
    """The versions of a run, from step 0 on; each is open."""

    place: str
    draws: tuple[Draws, ...]

    @classmethod
    def open(cls, place: str, changes: Sequence[VersionChange]) -> Self:
        """Raises CinemeshError for a version that is not there, and for one without a bucket that another has."""
        held = HeldBlocks()
        opened = {change.version: Cache.open(place, change.version, held) for change in changes}
        first = opened[changes[0].version].version
        for cache in opened.values():
            shapes, wanted = ([bucket.bucket for bucket in of.buckets] for of in (cache.version, first))
            if shapes != wanted or cache.version.encoders != first.encoders or cache.version.codec != first.codec:
                raise CinemeshError(
                    f"data.versions: {cache.name} and {first.name} differ in their buckets, codec or encoders",
                    remedy="only rows may be added or withdrawn within a run",
                )
        return cls(place, tuple(Draws(change.step, opened[change.version]) for change in changes))

    def at(self, step: int) -> Cache:
        """What step ``step``, counted from 0, draws from."""
        return [draws.cache for draws in self.draws if draws.step <= step][-1]

    def text(self, until: int | None = None) -> str:
        """Of the steps before ``until``: what a run that goes on from there must have alike."""
        draws = [d for d in self.draws if until is None or d.step < max(until, 1)]
        return history_text([VersionChange(d.step, d.cache.name) for d in draws])

    def check_withdrawn(self, since: int, steps: int) -> None:
        """Raises CinemeshError where a step from ``since`` on would draw from a version with withdrawn clips."""
        if is_url(self.place):
            return
        gone = {*withdrawn(Path(self.place))}
        ends = [draws.step for draws in self.draws[1:]] + [steps]
        for draws, end in zip(self.draws, ends, strict=True):
            if end > since and (lacking := sorted(gone - {*draws.cache.version.withdrawn})):
                clips = ", ".join(lacking[:MOST_TOLD]) + ", ..." * (len(lacking) > MOST_TOLD)
                before = f"{self.text(since)}, " if since else ""
                given = f"{{{before}{since}: {version_names(Path(self.place))[-1]}}}"
                raise CinemeshError(
                    f"steps {max(since, draws.step)} to {end} would draw from version {draws.cache.name}, and "
                    f"{len(lacking)} of its clips were withdrawn since: {clips}",
                    remedy=f"go on with a version that lacks them: --set 'data.versions={given}'",
                )
