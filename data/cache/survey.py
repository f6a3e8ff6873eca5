"""What the files of a unit hold, and which of them are not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from tqdm import tqdm

from ..scenes import Scene, SceneTime
from ..sources import Source, bytes_digest
from ..stills import is_still, look_at
from ..video import BadClip, look_through


@dataclass(frozen=True)
class Skipped:
    """A file that is not trained on, and why; ``time_s``: where in it, None: as a whole."""

    file: str
    time_s: float | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.time_s is None else f' at {self.time_s:.3f} s'}: {self.reason}"


@dataclass(frozen=True)
class UnitSurvey:
    """Of whole files, their scenes in time, in the order in which they are read; ``files``: whether interlaced."""

    clips: int
    skipped: list[Skipped]
    files: dict[str, bool]
    digests: dict[str, str]  # of their bytes
    spans: list[SceneTime]

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        spans = [
            [s.scene.name, s.scene.first_frame, s.scene.last_frame, str(s.seconds), str(s.longest_shown), str(s.aspect)]
            for s in self.spans
        ]
        skipped = [asdict(row) for row in self.skipped]
        return {"clips": self.clips, "skipped": skipped, "files": self.files, "digests": self.digests, "spans": spans}

    @classmethod
    def of(cls, told: Mapping[str, Any], scenes: Sequence[Scene]) -> UnitSurvey:
        """From ``told``, of these scenes."""
        named = {scene.name: scene for scene in scenes}
        spans = [
            SceneTime(replace(named[name], first_frame=first, last_frame=last), *map(Fraction, times_and_aspect))
            for name, first, last, *times_and_aspect in told["spans"]
        ]
        skipped = [Skipped(**row) for row in told["skipped"]]
        return cls(told["clips"], skipped, told["files"], told["digests"], spans)


def look_at_files(scenes: Sequence[Scene], sources: Mapping[str, Source], progress: bool = False) -> UnitSurvey:
    """Decode the files of these scenes to their ends. Raises CinemeshError for a scene that its file does not have."""
    by_file: dict[str, list[Scene]] = {}
    for scene in scenes:
        by_file.setdefault(scene.file, []).append(scene)
    found = UnitSurvey(len(by_file), [], {}, {}, [])
    for file, here in tqdm(by_file.items(), desc="checking clips", unit="clip", disable=None if progress else True):
        source = sources[file]
        try:
            seen = (look_at if is_still(source) else look_through)(source, here)
            found.digests[file] = bytes_digest(source)
            found.files[file] = seen.interlaced
            found.spans.extend(seen.spans)
        except BadClip as bad:
            time_s = None if bad.time_s is None else float(bad.time_s)
            found.skipped.append(Skipped(str(bad.file), time_s, bad.reason))
    return found
