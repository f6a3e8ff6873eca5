"""The funnel as it is shown: rows a stage, hours, shares beside the paper's, and pictures of what was dropped last.

One HTML file: pictures and style inside it, nothing fetched.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...documents import read_yaml
from ...files import atomic_file
from .funnel import NEEDS, SCORE, FunnelStage
from .pipeline import Outcome
from .rows import ClipRow
from .settings import CurateSettings

REPORT = "report.html"
HERE = Path(__file__).parent
SHOWN = 8  # pictures of a stage
HOUR_S = 3600
TOLD = {
    "whole": "read to the end, as it is meant to be seen",
    "twice": "other bytes than any file before",
    "earlier": "in no earlier set",
    "length": "long enough",
}


@dataclass(frozen=True)
class Step:
    """One stage of one kind of rows. ``ran``: its place in this run. Shares are of what reached it; the paper's too."""

    stage: str
    ran: int
    limits: str
    reached: int
    dropped: int
    dropped_h: float
    left: int
    left_h: float
    share: float | None
    paper_share: float | None
    paper_left_percent: float | None


@dataclass(frozen=True)
class Shown:
    """A row that a stage dropped; ``image``: JPEG in base64, empty where none could be read."""

    image: str
    name: str
    why: str


class CurationReport:
    """What a run came to. ``cut_captions``: by encoder, how many are longer than it reads."""

    def __init__(self, settings: CurateSettings, outcome: Outcome, cut_captions: dict[str, Any]) -> None:
        self.settings, self.outcome, self.cut_captions = settings, outcome, cut_captions

    @property
    def kinds(self) -> list[str]:
        """Of the rows: video, image, or both."""
        return sorted({row["kind"] for row in self.outcome.rows}, reverse=True)

    @cached_property
    def paper(self) -> dict[str, float]:
        """Percent that is left, by stage."""
        return read_yaml(HERE / "table38.yaml", "the paper's table", "install cinemesh again")

    def rows(self, kind: str) -> list[ClipRow]:
        return [row for row in self.outcome.rows if row["kind"] == kind]

    def steps(self, kind: str) -> list[Step]:
        """The stages of the run in the paper's order; counts are of the order in which they ran."""
        left = self.rows(kind)
        made: list[Step] = []
        for number, stage in enumerate(self.outcome.stages, 1):
            if kind == "image" and (stage.needs == "scan" or limits_text(self.settings, stage, kind) == ""):
                continue
            gone = [row for row in left if row["dropped_by"] == stage.name]
            reached = len(left)
            left = [row for row in left if row["dropped_by"] != stage.name]
            made.append(
                Step(
                    stage=stage.name,
                    ran=number,
                    limits=limits_text(self.settings, stage, kind),
                    reached=reached,
                    dropped=len(gone),
                    dropped_h=_hours(gone),
                    left=len(left),
                    left_h=_hours(left),
                    share=len(left) / reached if reached else None,
                    paper_share=self._paper_share(stage.name) if kind == "video" else None,
                    paper_left_percent=self.paper.get(stage.name) if kind == "video" else None,
                )
            )
        order = [*NEEDS]
        return sorted(made, key=lambda step: order.index(step.stage.partition(" ")[0]))

    def _paper_share(self, stage: str) -> float | None:
        names = [*self.paper]
        if stage not in names:
            return None
        at = names.index(stage)
        return self.paper[stage] / self.paper[names[at - 1]] if at else 1.0

    def pictures(self, kind: str, stage: str) -> list[Shown]:
        """The last that a stage dropped."""
        gone = [row for row in self.rows(kind) if row["dropped_by"] == stage][-SHOWN:]
        return [Shown(_data(row), _name(row), row["why"]) for row in gone]

    def kept(self, kind: str) -> list[Shown]:
        """Some of what is left, evenly."""
        rows = [row for row in self.outcome.kept if row["kind"] == kind]
        count = min(SHOWN, len(rows))
        shown = [rows[int((part + 0.5) * len(rows) / count)] for part in range(count)]
        return [Shown(_data(row), _name(row), row.get("caption") or "") for row in shown]

    def values(self) -> dict[str, Any]:
        """As JSON has them."""
        return {
            "reading": self.settings.reading,
            "measured": self.outcome.measured,
            "kept": len(self.outcome.kept),
            "kept_h": _hours(self.outcome.kept),
            "stages": {kind: [asdict(step) for step in self.steps(kind)] for kind in self.kinds},
            "cut_captions": self.cut_captions,
        }

    def text(self, kind: str) -> str:
        """A table for a terminal."""
        lines = [f"{kind + 's':<18}{'reached':>9}{'dropped':>9}{'left':>9}{'hours':>9}{'stays':>8}{'paper':>8}"]
        for step in sorted(self.steps(kind), key=lambda step: step.ran):
            shares = [
                f"{share:>8.1%}" if share is not None else f"{'-':>8}" for share in (step.share, step.paper_share)
            ]
            counts = f"{step.reached:>9,}{step.dropped:>9,}{step.left:>9,}{step.left_h:>9.4f}"
            lines.append(f"{step.stage:<18}{counts}{''.join(shares)}")
        return "\n".join(lines)


def limits_text(settings: CurateSettings, stage: FunnelStage, kind: str) -> str:
    """What a stage asks, in words; empty where it is off for this kind."""
    keep = settings.videos if kind == "video" else settings.images
    if stage.kind == SCORE:
        limits: Any = keep.scores.get(stage.scorer)
        return "" if limits is None else _fields(limits)
    if stage.kind == "length":
        return f"{settings.cut.least_s:g} to {settings.cut.most_s:g} s, one shot"
    if stage.kind == "earlier":
        return TOLD["earlier"] if keep.earlier else ""
    if stage.kind in TOLD:
        return TOLD[stage.kind]
    rule: Any = getattr(keep, stage.kind)
    return "" if rule is None else _fields(rule)


def write_report(path: Path, report: CurationReport) -> None:
    """Write the page. Raises CinemeshError."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("curation.html").render(report=report, settings=report.settings)
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8")


def _fields(rule: Any) -> str:
    set_ = {name: value for name, value in asdict(rule).items() if value not in (None, False) and name != "seed"}
    told = (f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in set_.items())
    return ", ".join(told).replace("_", " ")


def _hours(rows: Sequence[ClipRow]) -> float:
    return sum(row["seconds"] or 0.0 for row in rows) / HOUR_S


def _data(row: ClipRow) -> str:
    return base64.b64encode(row.get("thumb") or b"").decode()


def _name(row: ClipRow) -> str:
    name = Path(row["file"]).name
    return (
        name
        if row["kind"] == "image" or "first_s" not in row
        else f"{name}, {row['first_s']:.2f} to {row['last_s']:.2f} s"
    )
