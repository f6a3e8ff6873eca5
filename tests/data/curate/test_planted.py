"""Each fault that is planted is dropped by the stage that should, and what has none stays."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as pq
import pytest
from PIL import Image
from planted_clips import curate

from cinemesh.data.curate.pipeline import CLIPS, CURATED, Outcome
from cinemesh.data.curate.report import CurationReport

Planted = tuple[Path, dict[str, tuple[str, ...]]]
Curated = tuple[Path, Outcome]


def by_file(outcome: Outcome) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for row in outcome.rows:
        found.setdefault(Path(row["file"]).name, []).append(row["dropped_by"] or "")
    return {name: tuple(stages) for name, stages in found.items()}


def test_each_is_dropped_by_its_own_stage(planted: Planted, curated: Curated) -> None:
    assert by_file(curated[1]) == planted[1]


def test_every_drop_says_why_and_no_kept_clip_does(curated: Curated) -> None:
    for row in pq.read_table(curated[0] / CLIPS).to_pylist():
        assert (row["why"] is None) == (row["dropped_by"] is None)


def test_the_tables_are_what_the_run_came_to(curated: Curated) -> None:
    out, outcome = curated
    clips, kept = (pq.read_table(out / name).to_pylist() for name in (CLIPS, CURATED))
    assert [row["id"] for row in clips] == [row["id"] for row in outcome.rows]
    assert [row["id"] for row in kept] == [row["id"] for row in clips if row["dropped_by"] is None]
    assert all(field.metadata[b"about"] for field in pq.read_schema(out / CLIPS))
    cyclist = next(row for row in kept if row["file"].endswith("a cyclist.mp4"))
    assert (cyclist["first_frame"], cyclist["last_frame"], cyclist["width"], cyclist["height"]) == (0, 60, 640, 272)
    assert (cyclist["first_s"], cyclist["fps"]) == (0.0, 25.0) and cyclist["last_s"] == pytest.approx(61 / 25)
    assert sum(row["weight"] for row in kept if row["kind"] == "video") == pytest.approx(2)


class Opens:
    """Counts what opens a video or an image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module in (av, Image):
            monkeypatch.setattr(module, "open", self._counting(module.open))

    def _counting(self, real: Any) -> Any:
        def opened(source: Any, *args: Any, **options: Any) -> Any:
            self.count += isinstance(source, str | Path)  # and not bytes that are kept
            return real(source, *args, **options)

        return opened


@pytest.fixture
def again(curated: Curated, tmp_path: Path) -> Path:
    """A copy of what the run wrote: others read that."""
    return Path(shutil.copytree(curated[0], tmp_path / "again"))


def test_another_threshold_decodes_nothing(
    planted: Planted, curated: Curated, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = Opens(monkeypatch)
    before = by_file(curated[1])
    limits = {"text": {"below": 0.9999}, "copies": {"cosine": 0.9999, "most_bits": None}, "motion": {"vmaf": 5.5}}
    outcome = curate({"sources": [str(planted[0])], "videos": limits}, again)
    assert opens.count == 0 and set(outcome.measured.values()) == {0}
    after = by_file(outcome)
    assert after["two\nlines.mp4"] == ("motion",) and before["two\nlines.mp4"] == ("",)
    assert after["copy later.mp4"] == ("",) and before["copy later.mp4"] == ("copies",)


def test_a_looser_limit_reads_what_it_lets_in_and_no_more(planted: Planted, again: Path) -> None:
    outcome = curate({"sources": [str(planted[0])], "videos": {"static": None}}, again)
    assert by_file(outcome)["freeze.mp4"] != ("static",)
    assert outcome.measured["scan"] == 0 and outcome.measured["samples"] == 1


def test_the_page_counts_what_was_dropped(curated: Curated, planted: Planted) -> None:
    from cinemesh.data.curate.settings import settings_of

    settings = settings_of({"preset": "small", "sources": [str(planted[0])]}, "x")
    report = CurationReport(settings, curated[1], {})
    for kind in report.kinds:
        steps = sorted(report.steps(kind), key=lambda step: step.ran)
        assert steps[0].reached == len(report.rows(kind))
        for before, after in pairwise(steps):
            assert before.left == after.reached and before.reached - before.dropped == before.left
        assert steps[-1].left == sum(row["kind"] == kind for row in curated[1].kept)
    motion = next(step for step in report.steps("video") if step.stage == "motion")
    assert motion.paper_share == pytest.approx(1.32 / 1.57)
