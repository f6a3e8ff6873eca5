"""Building a version of the latent cache: every window and every caption of the scenes encoded once, then listed.

    surveys/KEY.json        what the files of a unit hold, by their sizes and times
    latents/KEY/            the windows of a unit's scenes: a tar for each bucket and split, rows.parquet
    captions/KEY/           their captions: captions.tar, rows.parquet
    index/, versions/       see ``index`` and ``version``
    plans/, made/           the units of a recipe; which version it is

A unit is a run of scenes that fill about SHARD_BYTES. Its KEY is the digest of what it is made of, so what is there is
never made twice: a build that was killed goes on, others may build beside it (see work.py), a caption that is written
anew encodes no window, and rows that are added encode theirs alone. A clip that is damaged or cannot be shown as it is
meant is skipped, and written down in SKIPPED_FILE; more of them than ``data.bad_share`` end the job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...documents import read_json
from ...errors import CinemeshError
from ...files import atomic_file
from ..buckets import latents_of
from ..encoding import Encoding
from ..scenes import Scene
from ..settings import DataSettings, Tally
from ..sources import Source, stamp
from .decoding import sources_of, windows_of
from .digests import digest_of
from .listing import Listing
from .survey import Skipped, UnitSurvey, look_at_files
from .units import UnitFiles, encode_captions, told_captions, write_windows
from .version import Version, version_names, withdrawn
from .work import Nobody, Onlooker, Task, share_out

# Raise it when the layout, how frames are picked, coloured, scaled and cropped, or what is drawn by a sample's id
# changes: from 6 on frames lie on a time grid, upright, of square pixels and told colours, and captions begin with
# their rate; from 8 on latents and captions are in tars of their own.
FORMAT = 8
SURVEY_FORMAT = 9  # of what files hold: 9 knows the shape of their frames
OLD_FILE = "clips.safetensors"  # of formats up to 7, all in one
LEFT_OUT_FILE = "left_out.json"  # scenes whose shape no bucket is near
SKIPPED_FILE = "skipped.json"
SHARD_BYTES = 10**9  # of a unit's latents: what a killed build loses of each process; a tar that is handled at once
UNIT_SCENES = 2**12  # of a unit: short scenes are looked through for a while, too
NOMINAL_FPS = 24  # of scenes given in frames, before their files are looked at: decides how many share a unit
NOMINAL_S = 10.0  # of clips that do not say how long they are
MOST_TOLD = 3  # bad clips in a message; the file has all


@dataclass(frozen=True)
class SceneUnit:
    """Scenes ``first`` to ``last`` - 1, and the key of their survey."""

    first: int
    last: int
    survey: str


@dataclass(frozen=True)
class CacheBuild:
    """What a recipe's version is made of, and where. ``after``: the version before, whose ids it goes on from."""

    settings: DataSettings
    encoding: Encoding
    root: Path
    units: tuple[SceneUnit, ...]
    after: str | None

    @classmethod
    def planned(cls, settings: DataSettings, encoding: Encoding, root: Path, after: str | None = None) -> CacheBuild:
        """Look where the files are and when they were written; nothing is decoded, and nothing written.

        Raises CinemeshError for bad captions or buckets, and for a scene whose file is not there.
        """
        latents_of(settings.shapes, encoding.codec)
        scenes, sources = settings.scenes(), settings.sources()
        units: list[SceneUnit] = []
        for first, last in _runs(settings, encoding, scenes):
            here = scenes[first:last]
            units.append(SceneUnit(first, last, _survey_key(here, sources_of(here, sources))))
        if not units:
            raise CinemeshError(f"{settings.captions} has no scene", remedy="give it some")
        return cls(settings, encoding, root, tuple(units), after)

    @classmethod
    def joined(cls, settings: DataSettings, encoding: Encoding, root: Path, digest: str) -> CacheBuild:
        """The build that another process planned and wrote down."""
        remedy = "start it again, with a data.cache that all ranks reach: one machine's own folder is built by itself"
        told = read_json(root / "plans" / f"{digest}.json", "the plan of a build", remedy)
        return cls(settings, encoding, root, tuple(SceneUnit(*unit) for unit in told["units"]), told["after"])

    @cached_property
    def digest(self) -> str:
        """Of all that the version is made of."""
        settings, encoding = self.settings, self.encoding
        scenes = [
            digest_of(
                [[s.name, s.file, [asdict(w) for w in s.wordings], s.weight] for s in self.scenes[u.first : u.last]]
            )
            for u in self.units
        ]
        gone = withdrawn(self.root)
        made_of = [FORMAT, windows_key(settings, encoding), captions_key(encoding), settings.balance, self.after, gone]
        return digest_of([made_of, [unit.survey for unit in self.units], scenes])

    @cached_property
    def scenes(self) -> Sequence[Scene]:
        return self.settings.scenes()

    @cached_property
    def sources(self) -> dict[str, Source]:
        return self.settings.sources()

    # -- what is there -----------------------------------------------------------------------------------------------

    def version(self) -> str | None:
        """The version, if it is there. Raises CinemeshError where more clips were skipped than may be."""
        if not self._made.exists():
            return None
        told = read_json(self._made, "what a recipe has made", "delete it: nothing is encoded anew")
        if told["version"] not in version_names(self.root):
            return None
        self._skip([Skipped(**row) for row in told["skipped"]], told["clips"])
        return told["version"]

    def write_plan(self) -> None:
        """For processes that join."""
        told = {"after": self.after, "units": [[unit.first, unit.last, unit.survey] for unit in self.units]}
        _write_json(self.root / "plans" / f"{self.digest}.json", told)

    @property
    def _made(self) -> Path:
        return self.root / "made" / f"{self.digest}.json"

    @property
    def _keys(self) -> Path:
        return self.root / "plans" / f"{self.digest}.keys.json"

    # -- work --------------------------------------------------------------------------------------------------------

    def work(self, progress: bool = True, onlooker: Onlooker | None = None) -> str:
        """Do what nobody else does until the version is there; its name.

        ``onlooker``: hears how far this process is. Raises CinemeshError for too many bad clips, for scenes or buckets
        without windows, latents or embeddings that are not finite, and a full disk.
        """
        watched = onlooker or Nobody()
        begun = self._share("checking clips", progress, (self._survey_task(unit) for unit in self.units), watched)
        begun([Task(f"keys-{self.digest}", self._keys, self._settle, 0)])
        keys = read_json(self._keys, "the plan of a build", "delete it")["units"]
        captions = (self._captions_task(unit, *of) for unit, of in zip(self.units, keys, strict=True))
        self._share("encoding captions", False, captions, watched)
        latents = (self._latents_task(unit, *of) for unit, of in zip(self.units, keys, strict=True))
        begun = self._share("encoding clips", progress, latents, watched)
        begun([Task(f"made-{self.digest}", self._made, self._list, 0)])
        made = self.version()
        assert made is not None
        return made

    def _share(
        self, what: str, progress: bool, tasks: Iterator[Task], onlooker: Onlooker
    ) -> Callable[[Sequence[Task]], None]:
        listed_tasks = list(tasks)
        clips = sum(task.clips for task in listed_tasks)
        with tqdm(total=clips, desc=what, unit="clip", disable=None if progress else True) as bar:
            share_out(self.root, listed_tasks, bar.update, onlooker)
        return lambda more: share_out(self.root, more, lambda clips: None, onlooker)

    def _survey_task(self, unit: SceneUnit) -> Task:
        def do() -> None:
            here = self.scenes[unit.first : unit.last]
            _write_json(path, look_at_files(here, sources_of(here, self.sources)).told())

        path = self.root / "surveys" / f"{unit.survey}.json"
        return Task(f"survey-{unit.survey}", path, do, unit.last - unit.first)

    def _surveyed(self, unit: SceneUnit) -> UnitSurvey:
        path = self.root / "surveys" / f"{unit.survey}.json"
        told = read_json(path, "what clips hold", "delete it: they are looked through again")
        return UnitSurvey.of(told, self.scenes[unit.first : unit.last])

    def _settle(self) -> None:
        """Once all files are looked through: what the units are made of. Refuses what cannot be trained on."""
        tally, skipped, clips = Tally(), list[Skipped](), 0
        left_out: list[Skipped] = []
        keys: list[tuple[str, str]] = []
        for unit in self.units:
            found = self._surveyed(unit)
            skipped += found.skipped
            clips += found.clips
            keys.append(self._unit_keys(found))
            for span in found.spans:
                cuts = self.settings.cut(span)
                tally.add(span, cuts)
                if not cuts:
                    left_out.append(Skipped(span.scene.file, None, self.settings.no_shape(span)))
        self._skip(skipped, clips)
        self._say_cropped(tally, left_out)
        self.settings.check(tally)
        told = {"units": keys, "clips": clips, "skipped": [asdict(row) for row in skipped]}
        _write_json(self._keys, told)

    def _unit_keys(self, found: UnitSurvey) -> tuple[str, str]:
        windows = [[s.name, s.file, s.first_frame, s.last_frame] for s in (span.scene for span in found.spans)]
        latents = [FORMAT, windows_key(self.settings, self.encoding), windows, found.digests]
        told = [[told.clip, str(told.rate), told.text] for told in told_captions(found.spans, self.settings.cut)]
        return digest_of(latents), digest_of([FORMAT, captions_key(self.encoding), told])

    def _skip(self, skipped: Sequence[Skipped], clips: int) -> None:
        """Write down what is skipped. Raises CinemeshError where more clips are bad than may be, or all are."""
        path = self.root / SKIPPED_FILE
        if skipped:
            _write_json(path, [asdict(row) for row in skipped])
        else:
            path.unlink(missing_ok=True)  # of an earlier build
        if len(skipped) <= self.settings.bad_share * clips and len(skipped) < clips:
            if skipped:
                told = f"{path} says which, where and why"
                print(f"{len(skipped)} of {clips} clips are skipped: {told}", file=sys.stderr)
            return
        told = ", ".join(map(str, skipped[:MOST_TOLD])) + ", ..." * (len(skipped) > MOST_TOLD)
        raise CinemeshError(
            f"{len(skipped)} of {clips} clips cannot be trained on, and data.bad_share is {self.settings.bad_share:g}: "
            f"{told}",
            remedy=f"replace them or leave them out ({path} lists all), or raise data.bad_share",
        )

    def _say_cropped(self, tally: Tally, left_out: Sequence[Skipped]) -> None:
        """What buckets cut off, where a recipe limits it; the scenes that have no bucket are listed."""
        if self.settings.crop_limit is None:
            return
        path = self.root / LEFT_OUT_FILE
        _write_json(path, [asdict(row) for row in left_out])
        told = f"; {len(left_out)} are in no bucket, {path} says which" if left_out else ""
        print(
            f"of {tally.scenes} scenes buckets cut off {tally.cropped / max(tally.scenes, 1):.1%} of the pixels on "
            f"average, {tally.most_cropped:.1%} at most (data.crop_limit {self.settings.crop_limit:g}){told}",
            file=sys.stderr,
        )

    def _captions_task(self, unit: SceneUnit, latents: str, captions: str) -> Task:
        def do() -> None:
            told = told_captions(self._surveyed(unit).spans, self.settings.cut)
            encode_captions(path, self.encoding, told, self.settings.captions)

        path = self.root / UnitFiles.CAPTIONS / captions
        return Task(f"captions-{captions}", path, do, unit.last - unit.first)

    def _latents_task(self, unit: SceneUnit, latents: str, captions: str) -> Task:
        def do() -> None:
            found = self._surveyed(unit)
            cuts = {span.scene.name: self.settings.cut(span) for span in found.spans}
            windows = windows_of(found, sources_of([span.scene for span in found.spans], self.sources), cuts)
            write_windows(path, self.encoding, windows, [str(bucket) for bucket in self.settings.shapes])

        path = self.root / UnitFiles.LATENTS / latents
        return Task(f"latents-{latents}", path, do, unit.last - unit.first)

    def _list(self) -> None:
        """Once all units are encoded: the index of their rows, and the version."""
        told = read_json(self._keys, "the plan of a build", "delete it")
        units = [UnitFiles(self.root, *of) for of in told["units"]]
        before = None if self.after is None else Version.of(self.root, self.after)
        made = Listing(
            self.root, self.settings, self.encoding, units, self.scenes, before, withdrawn(self.root), told["clips"],
            len(told["skipped"]),
        ).version()  # fmt: skip
        made.write(self.root)
        _write_json(self._made, {"version": made.name, "clips": told["clips"], "skipped": told["skipped"]})


def build_cache(settings: DataSettings, encoding: Encoding, root: Path, progress: bool = True) -> str:
    """The version of these settings, built where it is missing; its name. Raises CinemeshError as ``work``."""
    order = CacheBuild.planned(settings, encoding, root)
    say_old(root)
    return order.version() or order.work(progress)


def say_old(root: Path) -> None:
    """What an earlier release left is not touched."""
    if (root / OLD_FILE).exists():
        print(
            f"{root / OLD_FILE} is the latent cache of an earlier release and is not read: the clips are encoded anew "
            "beside it; delete it when you want the space",
            file=sys.stderr,
        )


def windows_key(settings: DataSettings, encoding: Encoding) -> list[object]:
    """What decides which windows scenes have, and their latents."""
    buckets = [
        {"shape": b.shape, "fps": b.fps, "squeeze_from_s": b.squeeze_from_s} | ({"name": b.name} if b.name else {})
        for b in settings.shapes
    ]
    rules = [encoding.codec.fingerprint, buckets, settings.stride, settings.validation_share]
    rules += [] if settings.crop_limit is None else [settings.crop_limit]
    return rules if encoding.low_resolution is None else [*rules, encoding.low_resolution.facts]


def captions_key(encoding: Encoding) -> list[object]:
    """What decides the embeddings of a caption."""
    return [[e.name, e.width, e.tokens, e.fingerprint] for e in encoding.encoders]


def _told_of(scene: Scene) -> list[object]:
    return [scene.name, scene.file, [[wording.text, wording.weight] for wording in scene.wordings], scene.weight]


def _survey_key(scenes: Sequence[Scene], sources: Mapping[str, Source]) -> str:
    told = [[s.name, s.file, s.first_frame, s.last_frame, s.from_s, s.until_s] for s in scenes]
    return digest_of([SURVEY_FORMAT, told, {file: _stamp(source) for file, source in sources.items()}])


def _stamp(source: Source) -> list[object]:
    try:
        return stamp(source)
    except OSError as error:
        return ["unreadable", error.strerror]  # it is skipped, and once it can be read the survey is another


def _runs(settings: DataSettings, encoding: Encoding, scenes: Sequence[Scene]) -> Iterator[tuple[int, int]]:
    """Runs of scenes that fill about SHARD_BYTES, by what is known before their files are looked at."""
    codec = encoding.codec
    sizes = [4 * codec.channels * t * h * w for t, h, w in latents_of(settings.shapes, codec)]
    first, filled = 0, 0.0
    number = -1
    for number, scene in enumerate(scenes):
        if scene.from_s is None:
            seconds = scene.frames / NOMINAL_FPS
        else:
            seconds = float(scene.until_s - scene.from_s) if scene.until_s is not None else NOMINAL_S
        for bucket, size in zip(settings.shapes, sizes, strict=True):
            filled += size * max(1.0, (seconds * bucket.fps - bucket.frames) / settings.stride)
        if filled >= SHARD_BYTES or number + 1 - first >= UNIT_SCENES:
            yield first, number + 1
            first, filled = number + 1, 0.0
    if number + 1 > first:
        yield first, number + 1


def _write_json(path: Path, values: Any) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")
