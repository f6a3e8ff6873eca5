"""The HTML page of a report: one file, its pictures and style inside it, nothing fetched (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..prices.played import PlayedStep
from ..prices.startup import HostsStart, StartUp, hosts_start, start_up
from ..search.planner import Search
from ..search.request import Request
from . import explain
from .exchanges import Exchange, exchanges
from .explain import Duplicate, Exposure, Sensitivity, describe, digits
from .float8 import Float8, float8
from .landscape import FAMILIES, Landscape, Point
from .software import kernels_of
from .trace import Span, predicted
from .waterfall import Loss, told, waterfall

TEMPLATES = Path(__file__).parent / "templates"
ROWS = 14  # of the tables of collectives and duplicates
REFUSED = 40  # refused families listed


@dataclass(frozen=True)
class Picture:
    """One picture as SVG elements, for a screen and for a phone, and the PNG file of it beside the page."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Story:
    """What the report tells: the search, its first plans played whole, and what was searched around it.

    ``trace``: file name of the best plan's trace.
    """

    request: Request
    found: Search
    wholes: list[PlayedStep]
    landscape: Landscape
    scaling: list[Point]
    sensitivities: list[Sensitivity]
    trace: str

    @property
    def best(self) -> PlayedStep:
        return self.wholes[0]

    @property
    def runner_up(self) -> PlayedStep | None:
        return self.wholes[1] if len(self.wholes) > 1 else None

    @cached_property
    def spans(self) -> list[Span]:
        """Of the best plan's step."""
        return predicted(self.best)

    @cached_property
    def waterfall(self) -> list[Loss]:
        """Of the best plan's step."""
        return waterfall(self.best, self.request.cluster)

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """What the best plan's step would be with other exchanges over cp."""
        return exchanges(self.best, self.request.config, self.request.cluster)

    @cached_property
    def float8(self) -> list[Float8]:
        """What the best plan's step would be with fp8 linear layers."""
        return float8(self.best, self.request.cluster)

    @property
    def mfu(self) -> float:
        """Of the best plan's step."""
        return explain.mfu(self.best, self.request.cluster)

    @property
    def exposures(self) -> list[Exposure]:
        return [row for row in explain.exposures(self.best) if row.exposed_s > 0.0][:ROWS]

    @property
    def duplicates(self) -> list[Duplicate]:
        return explain.duplicates(self.best)[:ROWS]

    @property
    def start_up(self) -> list[StartUp]:
        return start_up(self.best.plan, self.request.cluster)

    @cached_property
    def hosts(self) -> HostsStart | None:
        return hosts_start(self.best.plan, self.request.cluster)

    @property
    def why_lost(self) -> list[str]:
        return explain.why_lost(self.best, self.runner_up) if self.runner_up else []

    @property
    def shapes(self) -> str:
        """Every sample shape with its tokens, and its share where there are several."""
        buckets = self.request.buckets
        total = sum(bucket.weight for bucket in buckets)
        return ", ".join(
            f"{'x'.join(map(str, bucket.latent))} ({self.request.config.tokens(bucket.latent):,} tokens)"
            + (f" in {bucket.weight / total:.0%} of the steps" if len(buckets) > 1 else "")
            for bucket in buckets
        )


def page_templates() -> Environment:
    """Where pages come from; a name that is not given is an error, and text is escaped."""
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def render(story: Story, pictures: list[Picture]) -> str:
    """The page as text."""
    environment = page_templates()
    environment.filters |= {"describe": describe, "digits": digits}
    request, best = story.request, story.best
    return environment.get_template("report.html").render(
        story=story,
        pictures={picture.name: picture for picture in pictures},
        ties={id(choice) for choice in story.found.near_ties()},
        identity=id,
        mfu=story.mfu,
        losses=told(story.waterfall),
        hfu=explain.hfu(best, request.cluster),
        kernels=kernels_of(request.cluster, request.config, best.plan.compute_dtype),
        binds=explain.binds(best),
        families=FAMILIES,
        refused=story.found.refused[:REFUSED],
    )
