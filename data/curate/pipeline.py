"""A run of curation: files to rows, measured stage by stage, dropped, and written down.

    OUT/measured/        what was computed; it stays, and is not computed again
    OUT/clips.parquet    every clip, and every file that gave none: what was measured, which stage dropped it, and why
    OUT/curated.parquet  the clips that are left, as the latent cache takes them
    OUT/report.html      the funnel, beside the paper's

Rows stand in memory, some KB each: a larger pool is curated in parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import CinemeshError
from ..scenes import find_clips, read_captions
from ..sources import Tarred
from ..stills import is_still
from .borders import BorderMeasure
from .camera import CameraMeasure, read_labels
from .captions import CaptionMeasure, by_overlap, check_told, prefixed
from .clusters import Resample
from .concepts import ConceptMeasure, read_verbs
from .cutting import CLIP_COLUMNS
from .embedders import EmbedderSettings, fingerprint
from .engine import Engine
from .funnel import SETS, FunnelStage, drop, judge_of, stages
from .likeness import EmbeddingMeasure, HashMeasure
from .measure import Measuring, Store
from .movement import stillness
from .probe import Probe
from .rows import ID, ClipRow, text_path, titled, write_parquet
from .scorers import ScoreMeasure
from .settings import CurateSettings, verbs_of

CLIPS, CURATED = "clips.parquet", "curated.parquet"

FILE_COLUMNS = (
    titled("file", pa.string(), "path of the video or image"),
    titled("kind", pa.string(), "video or image"),
    titled("digest", pa.string(), "SHA-256 of the file"),
    titled("width", pa.int32(), "pixels, upright, of square pixels"),
    titled("height", pa.int32(), "pixels, upright, of square pixels"),
    titled("fps", pa.float64(), "frames/s of the file, the mean; null of an image"),
    titled("seconds", pa.float64(), "of the clip, or of a file that gave none; 0 of an image"),
)
MORE_COLUMNS = (
    titled("border_share", pa.float32(), "of the height or the width, whichever bars take more of"),
    titled("text_score", pa.float32(), "detection times recognition confidence, the highest; 0: no text"),
    titled("text", pa.string(), "what was read with that score"),
    titled("camera_by_hand", pa.string(), "by the labels file"),
    titled("concept", pa.string(), "the verb or expression that is nearest"),
    titled("concept_cosine", pa.float32(), "of the clip and that text"),
    titled("cluster", pa.int32(), "its number, the largest is 0; of what was left when clusters were made"),
    titled("caption", pa.string(), "with its camera class before it where that is sure; without its rate"),
    titled("told_by", pa.string(), "the model that told the caption; null: the captions file"),
    titled("weight", pa.float64(), "how often it is to be drawn, beside 1 for the mean"),
    titled("dropped_by", pa.string(), "the stage; null: it is kept"),
    titled("why", pa.string(), "of the drop"),
)
OF_CURATED = ("file", "first_s", "last_s", "caption", "weight", "id", "kind", "digest", "first_frame", "last_frame",
              "width", "height", "fps", "camera", "concept", "cluster", "told_by")  # fmt: skip


@dataclass
class Outcome:
    """What a run came to. ``measured``: units that were computed now, by measure."""

    rows: list[ClipRow]
    stages: list[FunnelStage]
    measured: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> list[ClipRow]:
        return [row for row in self.rows if row["dropped_by"] is None]


class Curation:
    """One run into the folder ``out``. ``told`` hears of work: the measure, how many units are done, of how many."""

    def __init__(
        self, settings: CurateSettings, out: Path, engine: Engine, told: Callable[[str, int, int], None]
    ) -> None:
        self.settings, self.out = settings, out
        self._engine, self._told = engine, told
        self._rows: list[ClipRow] = []
        self._cut = False
        self._measured: dict[str, int] = {}
        self._done: set[str] = set()  # measures that all rows at hand have
        self._samples = Store(out, settings.measure.samples)

    def run(self) -> Outcome:
        """Measuring, decide, write. Raises CinemeshError."""
        found = stages(self.settings)
        self._rows = self._files()
        if self.settings.measure.everything:
            self._measure_everything(found)
        for stage in found:
            alive = self._ready(stage)
            if stage.kind in SETS:
                self._drop_of_set(stage, alive)
            else:
                judge = judge_of(stage, self.settings)
                drop(alive, stage.name, {row["id"]: why for row in alive if (why := judge(row)) is not None})
        if not self._cut:
            self._cut_videos(self._alive())
        outcome = Outcome(self._rows, found, self._measured)
        self._caption(outcome.kept)
        self._weigh(outcome.kept)
        self._write(outcome)
        return outcome

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _files(self) -> list[ClipRow]:
        """A row of every file of the sources, probed. Named by place and time until the digest is known."""
        rows: list[ClipRow] = []
        found = find_clips(self.settings.sources).values()
        if tars := sorted({str(clip.tar) for clip in found if isinstance(clip, Tarred)}):
            raise CinemeshError(f"{tars[0]} is a tar, and files are curated", remedy="unpack it, or leave it out")
        for path in sorted(clip for clip in found if isinstance(clip, Path)):
            told = f"{text_path(path)} {_stamp(path)}"
            rows.append(
                {"id": hashlib.sha256(told.encode()).hexdigest(), "file": str(path), "kind": _kind(path)}
                | dict.fromkeys(("dropped_by", "why"))
            )
        probed = self._values(Store(self.out, Probe()), rows)
        seen: dict[str, int] = {}
        for row in rows:
            row |= {name: value for name, value in probed[row["id"]].items() if name != "id"}
            name = (row["digest"] or row["id"])[:32]
            seen[name] = seen.get(name, 0) + 1
            row["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
            row |= {"first_frame": 0, "last_frame": 0, "seconds": row["told_s"]}
        return rows

    def _alive(self) -> list[ClipRow]:
        return [row for row in self._rows if row["dropped_by"] is None]

    def _ready(self, stage: FunnelStage) -> list[ClipRow]:
        """The rows that are left, with what the stage looks at."""
        needs = stage.needs
        if needs != "probe" or stage.kind in SETS:
            self._cut_videos(self._alive())
        alive = self._alive()
        if needs not in ("probe", "scan"):
            self._look(alive)
            alive = self._alive()
            self._measure(stage, alive)
        return alive

    def _cut_videos(self, alive: Sequence[ClipRow]) -> None:
        """Scan the videos that are left, and put their clips in their place. Once."""
        if self._cut:
            return
        self._cut = True
        videos = [row for row in alive if row["kind"] == "video"]
        videos.sort(key=lambda row: -(row["told_s"] or 0))  # the longest first: it would keep others waiting at the end
        scanned = Store(self.out, self.settings.measure.scan)
        self._compute(scanned, videos)
        made: list[ClipRow] = []
        left = {row["id"] for row in videos}
        for row in self._rows:
            if row["id"] not in left:
                made.append(row)
                continue
            found = scanned.values([row["id"]])[row["id"]]
            if found["problem"] is not None:
                made.append(row | {"dropped_by": "whole", "why": found["problem"]})
                continue
            still = stillness(found, self.settings.cut.change)
            shown = {name: found[name] for name in ("fps", "interlaced", "thumbs")} | still
            made += [row | shown | clip for clip in self.settings.cut.clips(row | found)]
        for row in made:
            if "thumbs" in row:
                thumbs = row.pop("thumbs")
                row["thumb"] = thumbs[min(int((row["first_s"] + row["last_s"]) / 2), len(thumbs) - 1)]
        self._rows = made

    # -- measures -----------------------------------------------------------------------------------------------------

    def _look(self, rows: Sequence[ClipRow]) -> None:
        """Take samples of the rows."""
        self._compute(self._samples, rows)
        problems = self._samples.values([row["id"] for row in rows], ["problem"])
        drop(rows, "whole", {each: row["problem"] for each, row in problems.items() if row["problem"] is not None})

    def _measure(self, stage: FunnelStage, rows: Sequence[ClipRow]) -> None:
        """Give rows the columns that a stage on single rows looks at."""
        if stage.kind == "text":
            self._add(self.settings.measure.text, rows)
        elif stage.kind == "borders":
            self._add(BorderMeasure(), rows)
        elif stage.kind == "score":
            scorer = self.settings.measure.scores[stage.scorer]
            found = self._values(Store(self.out, ScoreMeasure(scorer, scorer.fingerprint), [self._samples]), rows)
            for row in rows:
                row[f"score_{stage.scorer}"] = found[row["id"]]["score"]

    def _measure_everything(self, found: Sequence[FunnelStage]) -> None:
        """So that no limit ever needs more: of every clip of every file that can be read, all that stages look at."""
        rows = [row for row in self._rows if row["problem"] is None]
        videos = [row for row in rows if row["kind"] == "video"]
        scanned = Store(self.out, self.settings.measure.scan)
        self._compute(scanned, videos)
        clips = [row for row in rows if row["kind"] == "image"]
        for row in videos:
            told = scanned.values([row["id"]])[row["id"]]
            if told["problem"] is None:
                shown = row | {"interlaced": told["interlaced"]}
                clips += [shown | clip for clip in self.settings.cut.clips(row | told)]
        self._compute(self._samples, clips)
        problems = self._samples.values([row["id"] for row in clips], ["problem"])
        whole = [row for row in clips if problems[row["id"]]["problem"] is None]
        for stage in found:
            if stage.needs not in ("probe", "scan"):
                if stage.kind in SETS:
                    self._of_set(stage, whole)
                else:
                    self._measure(stage, [dict(row) for row in whole])

    def _add(self, measure: Measuring, rows: Sequence[ClipRow]) -> None:
        found = self._values(Store(self.out, measure, [self._samples]), rows)
        for row in rows:
            row |= found[row["id"]]

    def _values(self, measured: Store, rows: Sequence[ClipRow]) -> dict[str, ClipRow]:
        self._compute(measured, rows)
        return measured.values([row["id"] for row in rows])

    def _compute(self, measured: Store, rows: Sequence[ClipRow]) -> None:
        light = [{name: row.get(name) for name in LIGHT} for row in rows]
        units = list(measured.units(light))
        name = measured.measure.name
        self._measured[name] = self._measured.get(name, 0) + len(units)
        for done, path in enumerate(self._engine.compute(units), 1):
            measured.took(path)
            self._told(name, done, len(units))

    # -- stages that look at all rows ---------------------------------------------------------------------------------

    def _embeddings(self, embedder: EmbedderSettings) -> Store:
        return Store(self.out, EmbeddingMeasure(embedder, embedder.fingerprint), [self._samples])

    def _vectors(self, embedder: EmbedderSettings, rows: Sequence[ClipRow]) -> dict[str, Any]:
        return {each: row["vector"] for each, row in self._values(self._embeddings(embedder), rows).items()}

    def _of_set(self, stage: FunnelStage, rows: Sequence[ClipRow]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Vectors and hashes, by id, that a stage takes; concepts are put into the rows."""
        measure = self.settings.measure
        if stage.kind == "copies":
            asked = any(
                keep.copies is not None and keep.copies.most_bits is not None
                for keep in (self.settings.videos, self.settings.images)
            )
            hashes = self._values(Store(self.out, HashMeasure(), [self._samples]), rows) if asked else {}
            return self._vectors(measure.copies, rows), {each: row["hash"] for each, row in hashes.items()}
        if stage.kind == "resample":
            return self._vectors(measure.clusters, rows), {}
        if stage.kind == "neighbours":
            assert measure.joint is not None  # checked
            return self._vectors(measure.joint, rows), {}
        if stage.kind == "humans":
            assert measure.joint is not None  # checked
            joint, verbs = self._embeddings(measure.joint), read_verbs(verbs_of(measure))
            self._compute(joint, rows)
            found = self._values(
                Store(self.out, ConceptMeasure(measure.joint, measure.joint.fingerprint, verbs), [joint]), rows
            )
            for row in rows:
                row |= found[row["id"]]
        return {}, {}

    def _drop_of_set(self, stage: FunnelStage, alive: Sequence[ClipRow]) -> None:
        for kind, keep in (("video", self.settings.videos), ("image", self.settings.images)):
            rule: Any = getattr(keep, stage.kind)
            rows = [row for row in alive if row["kind"] == kind]
            if rule is None or not rows:
                continue
            vectors, hashes = self._of_set(stage, rows)
            if stage.kind == "copies":
                reasons = rule.dropped(rows, vectors, hashes)
            elif stage.kind == "neighbours":
                assert self.settings.measure.joint is not None  # checked
                reasons = rule.dropped(rows, vectors, self.settings.measure.joint.build().texts)
            elif stage.kind == "resample":
                reasons = self._resampled(rule, rows, vectors)
            else:
                reasons = rule.dropped(rows)
            drop(rows, stage.name, reasons)

    def _resampled(self, rule: Resample, rows: Sequence[ClipRow], vectors: dict[str, Any]) -> dict[str, str]:
        clusters = rule.clustered(rows, vectors)
        self._label(rows)
        for row in rows:
            row["cluster"] = clusters[row["id"]]
        weights = rule.weights(rows, clusters)
        for row in rows:
            row["weight"] = weights[row["id"]]
        return rule.dropped(rows, clusters)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _label(self, rows: Sequence[ClipRow]) -> None:
        """Camera classes, by hand and by a classifier."""
        settings = self.settings
        videos = [row for row in rows if row["kind"] == "video"]
        if settings.labels is not None:
            labels = by_overlap(videos, read_labels(Path(settings.labels)))
            for row in videos:
                row["camera_by_hand"] = labels[row["id"]].camera if row["id"] in labels else None
        if settings.measure.camera is not None and videos:
            self._look(videos)
            weights = fingerprint(settings.measure.camera.path)
            self._add(CameraMeasure(settings.measure.camera, weights), videos)

    def _caption(self, kept: Sequence[ClipRow]) -> None:
        settings = self.settings
        self._label(kept)
        if settings.captions is not None:
            path = Path(settings.captions)
            scenes = by_overlap(kept, read_captions(path))
            check_told(kept, scenes, path)
            told = {each: (scene.caption, None) for each, scene in scenes.items()}
        elif settings.measure.endpoint is not None and kept:
            self._look(kept)
            found = self._values(Store(self.out, CaptionMeasure(settings.measure.endpoint), [self._samples]), kept)
            told = {each: (row["told"], row["told_by"]) for each, row in found.items()}
        else:
            told = {}
        for row in kept:
            text, row["told_by"] = told.get(row["id"], (None, None))
            row["caption"] = None if text is None else prefixed(text, row, settings.camera_prefix)

    def _weigh(self, kept: Sequence[ClipRow]) -> None:
        for row in kept:
            row.setdefault("weight", 1.0)

    def _write(self, outcome: Outcome) -> None:
        scores = [
            titled(f"score_{stage.scorer}", pa.float32(), f"by measure.scores.{stage.scorer}")
            for stage in outcome.stages
            if stage.kind == "score"
        ]
        named = {each.name: each for each in (ID, *FILE_COLUMNS, *CLIP_COLUMNS, *scores, *MORE_COLUMNS)}
        outcome.rows.sort(key=lambda row: (row["file"], row["first_frame"], row["id"]))
        write_parquet(self.out / CLIPS, outcome.rows, [*named.values()])
        write_parquet(self.out / CURATED, outcome.kept, [named[name] for name in OF_CURATED])


LIGHT = ("id", "file", "kind", "width", "height", "first_frame", "last_frame", "seconds", "interlaced")


def _kind(path: Path) -> str:
    return "image" if is_still(path) else "video"


def _stamp(path: Path) -> str:
    """Changes when the file does; of one that cannot be looked at, that."""
    try:
        told = path.stat()
    except OSError:
        return "unseen"
    return f"{told.st_size} {told.st_mtime_ns}"
