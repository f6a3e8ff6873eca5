"""What a curation is asked: where files are, what is measured, what is kept. A preset, and what a YAML file changes.

``measure`` decides what is computed once and stays; ``cut``, ``videos`` and ``images`` decide what is kept of it, and
changing them reads no video again. A stage that is null is off. The order of ``Limits`` is the paper's (Table 38).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...documents import mapping, read_yaml
from ...errors import CinemeshError, did_you_mean
from ...reading import read_record
from .borders import Borders
from .camera import CameraPrefix, CameraSettings
from .captions import CaptionEndpoint
from .clusters import Resample
from .concepts import VERBS, Humans
from .copies import Copies
from .cutting import Cutting
from .detectors import detector
from .embedders import EmbedderSettings
from .movement import Jitter, Motion, Slides, Static
from .neighbours import Neighbours
from .overlaid import Text, TextMeasure
from .samples import SampleFrames
from .scan import Scan
from .scorers import ScoreLimits, ScorerSettings
from .shape import Aspect, Balance, Lasting, LeastSize

PRESET_FOLDER = Path(__file__).parent / "presets"
ORDERS = ("cheap", "paper")


@dataclass(frozen=True)
class Limits:
    """What stays, stage by stage; a stage that is null is off.

    ``earlier``: Parquet files of earlier sets, whose videos are left out. ``scores``: by the scorer's name in measure.
    """

    earlier: tuple[str, ...] = ()
    duration: Lasting | None = None
    size: LeastSize | None = None
    aspect: Aspect | None = None
    slides: Slides | None = None
    text: Text | None = None
    borders: Borders | None = None
    scores: dict[str, ScoreLimits | None] = field(default_factory=dict)
    static: Static | None = None
    motion: Motion | None = None
    jitter: Jitter | None = None
    copies: Copies | None = None
    neighbours: Neighbours | None = None
    humans: Humans | None = None
    balance: Balance | None = None
    resample: Resample | None = None


@dataclass(frozen=True)
class Measures:
    """What is computed, with what. ``joint``: an embedder of pictures and texts, for humans and neighbours.

    ``everything``: of every clip, whatever drops it; else what is dear is computed of what is left, and a looser limit
    reads those files again that it lets in.
    """

    everything: bool = False

    scan: Scan = field(default_factory=Scan)
    samples: SampleFrames = field(default_factory=SampleFrames)
    text: TextMeasure = field(default_factory=TextMeasure)
    copies: EmbedderSettings = field(default_factory=EmbedderSettings)
    clusters: EmbedderSettings = field(default_factory=EmbedderSettings)
    joint: EmbedderSettings | None = None
    verbs: str | None = None
    scores: dict[str, ScorerSettings] = field(default_factory=dict)
    camera: CameraSettings | None = None
    endpoint: CaptionEndpoint | None = None


@dataclass(frozen=True)
class CurateSettings:
    """All of it. ``reading``: which of the paper's words a preset follows where they disagree.

    ``credits``: to be said wherever pictures of the sources are shown. ``captions``, ``labels``: YAML files, of scenes
    and of camera classes that people told. ``order``: cheap, the stages whose measures cost least first, or paper, as
    in Table 38, so that what is left after each can be compared.
    """

    sources: tuple[str, ...]
    reading: str = ""
    credits: tuple[str, ...] = ()
    captions: str | None = None
    labels: str | None = None
    order: str = "cheap"
    camera_prefix: CameraPrefix | None = None
    measure: Measures = field(default_factory=Measures)
    cut: Cutting = field(default_factory=Cutting)
    videos: Limits = field(default_factory=Limits)
    images: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Raises CinemeshError for what is asked of weights that are not given, or of another scorer than measures."""
        if self.order not in ORDERS:
            raise CinemeshError(f"order is {self.order!r:.100}", remedy=did_you_mean(self.order, ORDERS))
        detector(self.measure.scan.shots)
        for section, keep in (("videos", self.videos), ("images", self.images)):
            self._check_keep(section, keep)

    def _check_keep(self, section: str, keep: Limits) -> None:
        measure = self.measure
        if keep.copies is not None:
            measure.copies.check("measure.copies")
            if keep.copies.embedder != measure.copies.kind:
                raise CinemeshError(
                    f"{section}.copies.cosine({keep.copies.cosine:g}) is a threshold of {keep.copies.embedder}, and "
                    f"measure.copies is {measure.copies.kind}",
                    remedy=f"a threshold belongs to an embedder: set {section}.copies.cosine and its embedder anew "
                    "(the shipped one: 0.95), or give measure.copies the weights",
                )
        if keep.resample is not None:
            measure.clusters.check("measure.clusters")
        for stage in ("humans", "neighbours"):
            if getattr(keep, stage) is not None:
                if measure.joint is None:
                    raise CinemeshError(
                        f"{section}.{stage} needs an embedder of pictures and texts, and measure.joint is not given",
                        remedy=f"give it a CLIP directory, {{kind: clip, path: DIRECTORY}}, or switch the stage off: "
                        f"{stage}: null",
                    )
                measure.joint.check("measure.joint")
        for name, limits in keep.scores.items():
            if limits is None:
                continue
            if name not in measure.scores:
                raise CinemeshError(
                    f"{section}.scores.{name} has limits, and measure.scores.{name} is not given",
                    remedy=f"say what measures it, or switch it off: {name}: null",
                )
            scorer = measure.scores[name]
            if limits.scorer != scorer.kind:
                raise CinemeshError(
                    f"{section}.scores.{name} has limits of {limits.scorer}, and it is measured by {scorer.kind}",
                    remedy="limits belong to a scorer: give both anew",
                )
            scorer.check(f"measure.scores.{name}")


def presets() -> list[str]:
    """Names of those that ship."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def settings_of(values: object, where: str) -> CurateSettings:
    """From what a YAML file at ``where`` holds: ``preset``, by name, and what changes in it. Raises CinemeshError."""
    known = ["preset", *(each.name for each in fields(CurateSettings))]
    given = dict(mapping(values, where, known, required=("sources",)))
    name = given.pop("preset", None)
    base: dict[str, Any] = {}
    if name is not None:
        if name not in presets():
            raise CinemeshError(f"{where}: preset is {name!r:.100}", remedy=did_you_mean(name, presets()))
        base = read_yaml(PRESET_FOLDER / f"{name}.yaml", "the preset", "install cinemesh again")
    settings = read_record(CurateSettings, merged(base, given), where)
    settings.check()
    return settings


def merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Mapping into mapping, key by key; anything else, null too, is taken as given."""
    made = dict(base)
    for key, value in given.items():
        there = made.get(key)
        made[key] = merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return made


def verbs_of(measure: Measures) -> Path:
    """The list that concepts are taken from."""
    return VERBS if measure.verbs is None else Path(measure.verbs)
