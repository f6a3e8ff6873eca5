"""The report: what it says is there and predicted, needs no network, reads in black and white, and is not cut off.

A small model on a small cluster: the searches are real, and quick.
"""

import colorsys
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from cinemesh.errors import CinemeshError
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.footprint import CLASSES, outside
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.report import draw_plans, draw_step, draw_waterfall, explain, landscape, report, trace
from cinemesh.perf_model.report.explain import describe, digits
from cinemesh.perf_model.report.landscape import Landscape, neutral_groups
from cinemesh.perf_model.report.page import Story
from cinemesh.perf_model.report.waterfall import LEAST
from cinemesh.perf_model.search.planner import Search, search
from cinemesh.perf_model.search.refusals import RefusalKind
from cinemesh.perf_model.search.request import LatentBucket, PricedPlan, Request

PICTURES = ["plans", "waterfall", "step", "block", "memory", "landscape", "scaling"]


def choice(batch: int, samples_per_s: float, tp: int = 1) -> PricedPlan:
    step_s = batch / samples_per_s
    return PricedPlan(Plan(tp=tp, dp_shard=8 // tp), 1, step_s, 0.9 * step_s, 0.8 * step_s, 10**9, batch)


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(77.06, 1, "77.1"), (3505.3, 1, "3,505.3"), (0.0139, 1, "0.0139"), (0.17, 1, "0.170"), (9.22, 1, "9.22"),
     (9.9624, 3, "9.962"), (0.104, 3, "0.104"), (0.003649, 3, "0.00365"), (0.0, 3, "0.000")],
)  # fmt: skip
def test_a_small_number_keeps_three_digits(value: float, decimals: int, text: str) -> None:
    """A clip of a million tokens on 72 GPUs is 0.0139 samples/s: with one decimal every plan has 0.0."""
    assert digits(value, decimals) == text


def test_neutral_groups() -> None:
    """Groups span batches, hold one plan a batch, and are as wide as the error, measured from their fastest."""
    slow, fast = choice(8, 9.95), choice(8, 10.0, tp=2)
    choices = [slow, fast, choice(16, 9.85), choice(32, 9.7), choice(64, 9.6), choice(128, 5.0)]
    groups = neutral_groups(choices, 0.02)
    assert [group.batches for group in groups] == [[8, 16], [32, 64]]
    assert groups[0].choices[0] is fast and slow not in groups[0].choices
    assert groups[0].step_s == pytest.approx((0.8, 16 / 9.85))


def test_frontier_is_the_fastest_of_each_batch() -> None:
    found = Landscape(8, 0.02, [choice(16, 1.0), choice(8, 2.0), choice(8, 3.0), choice(16, 0.5)])
    assert [(c.global_batch, c.samples_per_s) for c in found.frontier()] == [(8, pytest.approx(3)), (16, 1.0)]


def test_sizes_hold_the_request_and_end_with_the_cluster() -> None:
    request = Request(preset("tiny"), (LatentBucket((2, 4, 4)),), load("grand-teton-h100"), 24)
    assert landscape.sizes(request) == sorted({*landscape.SIZES, 24})
    assert max(landscape.sizes(request)) == 6144 == request.cluster.topology.servers * 8


def test_what_does_not_fit_is_crossed_out_at_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn of a job where some families fit and others do not, against whole steps of both.

    A picture that marks nothing as infeasible, or the wrong cell, passes every test of the searches behind it.
    """
    config, latent, cluster = preset("movie-gen-30b"), (32, 96, 96), load("grand-teton-h100")
    monkeypatch.setattr(landscape, "DEALS", ((1, 1), (2, 1)))
    found = landscape.explore(Request(config, (LatentBucket(latent),), cluster, 64, fixed={"tp": 1}), 0.02)
    figure = Figure()
    draw_plans.draw_landscape(figure, found, found.choices[0])
    feasible = figure.axes[1]
    size = [int(label.get_text()) for label in feasible.get_yticklabels()]
    marked = {
        line.get_marker(): {(batch, size[int(row)]) for batch, row in np.column_stack(line.get_data()).tolist()}
        for line in feasible.lines
    }
    notes = [note for note in feasible.texts if isinstance(note, Annotation)]
    told = {(note.xy[0], size[int(note.xy[1])]): float(note.get_text()) for note in notes}
    for samples, cp in itertools.product((1, 2), (1, 2)):
        plan = Plan(cp=cp, dp_shard=64 // cp, recompute="full", grad_units=2)
        least = play_step(config, plan, BatchShape(samples, latent), cluster).footprint
        cell = (plan.data_ranks * samples, cp)
        if least.peak_bytes <= least.limit_bytes:
            assert cell in marked["o"] - marked["x"]
        else:
            assert cell in marked["x"] - marked["o"]
            own = least.peak_bytes - sum(outside(cluster, plan).values())
            assert 0.9 * own / 1e9 < told[cell] < own / 1e9 + 0.05  # a lower bound, shown in tenths
    assert len(marked["x"]) == 3 and told.keys() == marked["x"]


def test_families_of_a_size_at_which_nothing_fits_are_crossed_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landscape, "DEALS", ((1, 1), (4, 1)))
    config, cluster = preset("movie-gen-30b"), load("grand-teton-h100")
    found = landscape.explore(
        Request(config, (LatentBucket((32, 96, 96)),), cluster, 64, fixed={"tp": 2, "cp": 2}), 0.02
    )
    assert [choice.samples for choice in found.choices] == [1]
    assert [(refusal.family, refusal.kind) for refusal in found.misfits] == [((2, 2, 4, 1), RefusalKind.MEMORY)]
    assert found.misfits[0].needs_bytes > found.misfits[0].free_bytes and len(found.nothing) == 1


# -- the files --------------------------------------------------------------------------------------------------------


class _Addresses(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.inside: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster"):
                self.fetched.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "xlink:href":
                self.inside.append(value or "")


def test_every_file_is_there_and_no_other(written: tuple[Path, list[Story]]) -> None:
    folder, _ = written
    wanted = {"report.html", "step.trace.json", *(f"{name}.png" for name in PICTURES)}
    assert {path.name for path in folder.iterdir()} == wanted


def test_the_page_needs_no_network(written: tuple[Path, list[Story]]) -> None:
    """Pictures are inside, links lead to files beside it, nothing is fetched."""
    folder, _ = written
    page = (folder / "report.html").read_text()
    found = _Addresses(page)
    assert found.tags.count("svg") == 2 * len(PICTURES) and found.fetched == []
    assert all(link.startswith("#") for link in found.inside)
    assert all((folder / link).exists() for link in found.links) and found.links
    assert not {"script", "link", "iframe", "image", "foreignobject"} & set(found.tags)
    named = re.sub(r"xmlns(:xlink)?=\"[^\"]*\"", "", page)  # names, which nobody fetches
    assert "http:" not in named and "https:" not in named and "@import" not in page
    assert set(re.findall(r"url\(.", page)) == {"url(#"}  # hatches and clips of the same page


def test_every_picture_says_that_it_is_predicted(written: tuple[Path, list[Story]]) -> None:
    """Each SVG is whole, and carries the words that stand above it."""
    folder, _ = written
    pictures = re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)
    assert len(pictures) == 2 * len(PICTURES)
    for svg in pictures:
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "PREDICTED, not measured" in svg
    named = [set(re.findall(r' id="([mp][0-9a-f]{10}|h[0-9a-f]{32})"', svg)) for svg in pictures]
    assert all(named[::2]) and not set().union(*named[::2]) & set().union(*named[1::2])  # one of the two is not shown
    for name in PICTURES:
        with Image.open(folder / f"{name}.png") as image:
            image.verify()


def test_the_page_tells_the_search(written: tuple[Path, list[Story]]) -> None:
    """Every ranked plan, every kind of explanation, and what was refused."""
    folder, (story,) = written
    page = re.sub(r"<svg.*?</svg>", "", (folder / "report.html").read_text(), flags=re.DOTALL)
    for ranked in story.found.choices:
        assert f"{describe(ranked.plan)}</td>" in page and f"{ranked.step_s:.3f}" in page
    assert story.runner_up is not None and describe(story.runner_up.plan) in page
    assert all(row.change in page for row in story.sensitivities) and len(story.sensitivities) == report.CHANGES
    assert all(f"{loss.seconds:.4f}</td>" in page for loss in story.waterfall if loss.share >= LEAST)
    assert all(row.name in page and f"{row.step_s:.3f}</td>" in page for row in story.exchanges if not row.problem)
    assert all(row.name in page and (row.problem or row.rates.split(";")[0]) in page for row in story.float8)
    assert len(story.exchanges) == 3 and "neither these exchanges nor fp8 run here" in page
    assert story.exposures and all(row.name in page for row in story.exposures)
    assert story.found.refused and str(story.found.refused[0].family) in page
    assert story.start_up and all(f">{row.name}</td>" in page for row in story.start_up)
    assert "cudnn for <code>attention</code>," in page
    assert "torch for <code>cross_attention</code>" in page  # of heads of 8


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_cut_off(written: tuple[Path, list[Story]], name: str, narrow: bool) -> None:
    """All that is drawn lies on the sheet; a label that is too long for its margin would not."""
    _, (story,) = written
    sheet = next(sheet for sheet in report.SHEETS if sheet.name == name)
    figure = report.drawn(sheet, story, narrow=narrow)
    figure.savefig(io.BytesIO(), dpi=40)  # lays it out
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0.0 and box.y0 >= 0.0 and box.x1 <= width and box.y1 <= height


def test_a_folder_that_cannot_be(request_and_search: tuple[Request, Search], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(CinemeshError, match="name a folder"):
        report.write(path, *request_and_search)
    assert path.read_text() == "mine"


# -- black and white --------------------------------------------------------------------------------------------------


def grey(colour: str) -> float:
    """Luma of a colour, 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return colorsys.rgb_to_yiq(red, green, blue)[0]


def test_kinds_differ_without_colour() -> None:
    """Two kinds with the same hatch differ in brightness."""
    bars = [(style["facecolor"], style.get("hatch", "")) for style in draw_step.STYLES.values()]
    looks_of = bars, draw_step.MEMORY.values(), draw_plans.TERMS, draw_waterfall.KINDS.values()
    for looks in map(list, looks_of):
        for (colour_a, hatch_a), (colour_b, hatch_b) in itertools.combinations(looks, 2):
            assert hatch_a != hatch_b or abs(grey(colour_a) - grey(colour_b)) > 0.15


def test_every_kind_of_record_has_a_look() -> None:
    """Copies to the host are collectives of no kind: a picture of a plan that offloads would stop at the first."""
    plan = Plan.parse("tp=2,cp=2,dp_shard=2,recompute=selective,offload=gate")
    played = play_step(replace(preset("tiny"), layers=3), plan, BatchShape(1, (2, 8, 8)), load("grand-teton-h100"))
    drawn = {draw_step.style_of(span) for span in trace.predicted(played)}
    assert {"to_host", "from_host", "all_gather"} <= drawn <= set(draw_step.STYLES)


def test_every_class_of_memory_has_a_look() -> None:
    """One that has none would be drawn like any other that has none."""
    assert set(CLASSES) == set(draw_step.MEMORY)


def test_more_of_a_resource_is_no_loss_and_a_tuned_plan_is_not_held_against_untuned_ones() -> None:
    """On all servers of a cluster: one more is one that it has not. Only this catches the two sides mixed."""
    cluster = load("grand-teton-h100").with_(**{"topology.servers": 2})
    asked = Request(preset("tiny"), (LatentBucket((2, 8, 8)),), cluster, 16, shown=1)
    found = search(asked)
    faster = replace(found.best, step_s=found.best.step_s / 2)
    rows = list(explain.sensitivities(asked, replace(found, choices=[faster], untuned=found.best)))
    *more, half = rows
    assert all(row.gain >= 0.0 for row in more)
    assert "8 more than grand-teton-h100 has" in more[-1].note and "24 GPUs" in more[-1].change
    assert half.gain < 0.0
    assert rows == list(explain.sensitivities(asked, found))
