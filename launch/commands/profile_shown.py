"""A profile as a person, a viewer and other commands read it: table, page, trace, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...files import atomic_file
from ...parallel.ir.span import Span
from ...perf_model.clusters.cluster import Cluster
from ...perf_model.prices.played import PlayedStep, play_program
from ...perf_model.report.profile_page import render_profile
from ...perf_model.report.profiling import StepProfile, profiled
from ...perf_model.report.trace import predicted, waits, write
from ..proof.traced import TakenSteps
from ..tables import new_console, plain_table

FIRST = 20  # rows that are printed where the page has them all


@dataclass(frozen=True)
class ToldProfile:
    """Steps of every rank beside the prediction of their program on a cluster. ``about``: what ran, in a line."""

    about: str
    cluster: Cluster
    whole: PlayedStep
    by_rank: Sequence[TakenSteps]
    profile: StepProfile

    @classmethod
    def of(cls, about: str, cluster: Cluster, whole: PlayedStep, by_rank: Sequence[TakenSteps]) -> ToldProfile:
        steps = [step for rank in by_rank for step in rank.watched]
        profile = profiled(steps, [seconds for rank in by_rank for seconds in rank.plain_s], whole)
        return cls(about, cluster, whole, by_rank, profile)

    def on(self, cluster: Cluster) -> ToldProfile:
        """The same steps beside another cluster's prediction."""
        return self.of(self.about, cluster, play_program(self.whole.program, self.whole.batch, cluster), self.by_rank)

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints: seconds of one step, the worst disagreement first."""
        told = {"about": self.about, "plan": self.whole.plan.to_dict(), "cluster": self.cluster.name}
        own = asdict(self.profile) | {"lanes": [*map(asdict, self.profile.lanes)]}
        return told | own | {"error": self.profile.error}

    def write_trace(self, path: Path) -> None:
        """A process a rank, and one of the prediction, from the start of the first step."""
        write(path, beside([rank.spans for rank in self.by_rank], self.whole))

    def write_page(self, path: Path) -> None:
        """One HTML file."""
        text = render_profile(self.about, self.cluster, self.whole.plan, self.profile, len(self.by_rank))
        with atomic_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def show(self, rows: int | None = None) -> None:
        """Print lanes and the first rows, all unless told."""
        profile, console = self.profile, new_console()
        console.print(
            f"{self.about}: a step took {profile.plain_step_s * 1e3:.1f} ms (mean of {profile.steps}, of all ranks), "
            f"{profile.step_s * 1e3:.1f} ms while it was watched; {self.cluster.name} predicts "
            f"{profile.predicted_step_s * 1e3:.1f} ms. What all lanes held is {profile.accounted:.1%} of it."
        )
        if self.cluster.device == "cpu" and self.cluster.has_placeholders("gloo"):
            console.print(
                "The prices are placeholders: calibrate this machine, or from this profile, and give --cluster."
            )
        numbers = ("ran", "predicted", "held", "predicted")
        table = plain_table("lane, ms a step", *numbers, right=numbers)
        for lane in profile.lanes:
            table.add_row(lane.lane, *_ms(lane))
        console.print(table)
        numbers = ("a step", *numbers)
        table = plain_table("record, ms a step", "kind", "lane", *numbers, right=numbers, breaks=("a step",))
        for row in profile.rows[:rows]:
            table.add_row(row.role, row.kind, row.lane, str(row.count), *_ms(row))
        console.print(table)
        console.print(f"mean error of the records' prices: {profile.error:.0%} of the time that they ran")


def _ms(of: Any) -> Sequence[str]:
    """``of``: a row or a lane."""
    return [f"{1e3 * s:.2f}" for s in (of.ran_s, of.predicted_ran_s, of.held_s, of.predicted_held_s)]


def beside(by_rank: Sequence[Sequence[Span]], whole: PlayedStep) -> Mapping[str, Sequence[Span]]:
    """One recording a rank and the prediction, from the start of the first step, with the waits of compute."""
    first = min(span.issued_s for spans in by_rank for span in spans)
    recordings: dict[str, Sequence[Span]] = {
        f"rank {rank}, measured": [
            replace(span, issued_s=span.issued_s - first, start_s=span.start_s - first, end_s=span.end_s - first)
            for span in spans
        ]
        for rank, spans in enumerate(by_rank)
    }
    expected = predicted(whole)
    return {**recordings, "predicted": [*expected, *waits(expected)]}


def print_json(told: ToldProfile) -> None:
    print(json.dumps(told.as_json(), indent=1))
