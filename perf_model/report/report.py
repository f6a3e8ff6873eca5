"""The report of a plan: pictures, an HTML page that needs no network, and a trace of the step.

    folder/report.html   step.trace.json   NAME.png: plans waterfall step block memory landscape scaling

Every picture tells kinds apart by hatch or marker as well as by colour, and says that it is predicted.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ...errors import CinemeshError
from ...files import atomic_file
from ..prices.played import PlayedStep
from ..search.planner import Search
from ..search.request import Request
from . import explain, trace
from .draw_plans import draw_landscape, draw_scaling, draw_terms
from .draw_step import GREY, draw_block, draw_memory, draw_step
from .draw_waterfall import draw_waterfall
from .explain import CHANGES, Tick, describe
from .landscape import deals, explore, scale, sizes
from .legend import columns
from .page import Picture, Story, render
from .waterfall import told

COMPARED = 5  # plans whose step is taken apart side by side
WIDTH_IN = 13.5  # of a picture on a screen; on a phone, where the page shows its text as large on 366 pixels:
NARROW_IN = 4.15
NARROW_TICKS = 4  # of time, or another scale, across
TITLE_PT, TITLE_COLUMNS = 12.0, 0.68  # columns: of the letters of ordinary text in a line
LINE_IN = 0.15  # height of a line of text
TRACE = "step.trace.json"
PAGE = "report.html"
PNG_DPI = 110
TEXT_PT = 9.0  # of all text in a picture; the page shows it at 11 pixels at least
STYLE: dict[Any, Any] = {
    "font.size": TEXT_PT,
    "axes.titlesize": TEXT_PT,
    "axes.labelsize": TEXT_PT,
    "xtick.labelsize": TEXT_PT,
    "ytick.labelsize": TEXT_PT,
    "legend.fontsize": TEXT_PT,
    "svg.fonttype": "none",  # text that can be searched, read aloud and measured
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Sheet:
    """A picture to draw: what it is called, says and shows. Height in inches, as wide as a screen and as a phone."""

    name: str
    title: str
    caption: str
    height_in: float
    narrow_in: float
    draw: Callable[[Figure, Story], None]


SHEETS = (
    Sheet(
        "plans",
        "Where the time of a sample goes",
        "GPU-seconds of one sample by term, for the plans at the top of the table, the best one first.",
        4.2,
        8.4,
        lambda figure, story: draw_terms(figure, story.wholes),
    ),
    Sheet(
        "waterfall",
        "From the chip's peak to the MFU",
        "Shares of the best plan's step: what each cause takes of 100 % of the peak, and the MFU that is left. Every "
        "loss stands on top of those above it.",
        6.4,
        9.6,
        lambda figure, story: draw_waterfall(figure, told(story.waterfall), story.mfu),
    ),
    Sheet(
        "step",
        "The step, lane by lane",
        "How busy every lane is over the step. Crossed areas of the compute lane are exposed waits.",
        7.7,
        9.5,
        lambda figure, story: draw_step(figure, story.spans, story.best.timeline.step_s),
    ),
    Sheet(
        "block",
        "One block, forward and backward",
        "Every record of a block in the middle of the model. Crossed bars are exposed waits; records that are made "
        "again in backward are hatched.",
        9.7,
        20.0,
        lambda figure, story: draw_block(figure, story.spans, story.request.config.layers // 2),
    ),
    Sheet(
        "memory",
        "Memory of one GPU over the step",
        "Live bytes by class, exact for what the program owns.",
        5.7,
        6.6,
        lambda figure, story: draw_memory(figure, story.best),
    ),
    Sheet(
        "landscape",
        "Plans over global batches",
        "Above: the best plan of each family, with its step time; bands are neutral groups. Below: which sizes of a "
        "model-parallel group fit into memory at which batch, and the GB that the others need with full recompute.",
        8.2,
        8.2,
        lambda figure, story: draw_landscape(figure, story.landscape, story.found.best),
    ),
    Sheet(
        "scaling",
        "Scaling: the best plan of every number of GPUs",
        "Each point: degrees, shard group x replicas, step time. The global batch is left open.",
        5.2,
        6.0,
        lambda figure, story: draw_scaling(figure, story.scaling),
    ),
)


def pieces(request: Request, found: Search) -> int:
    """How often ``write`` says what it begins."""
    return len(found.choices[:COMPARED]) + len(deals(request)) + len(sizes(request)) + CHANGES + len(SHEETS) + 1


def write(folder: Path, request: Request, found: Search, tick: Tick = lambda _: None) -> None:
    """Write the report of a search into a folder, beside what else is in it.

    Searches around the plan as well (other batches, other numbers of GPUs, other hardware), which takes most of the
    time; ``tick`` is told what begins. Every file takes its name when it is complete. Raises CinemeshError when the
    folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CinemeshError(f"report {folder}: {error.strerror}", remedy="name a folder that can be made") from None
    if not os.access(folder, os.W_OK):
        raise CinemeshError(
            f"report {folder}: the folder cannot be written", remedy="change its permissions or name another"
        )
    wholes: list[PlayedStep] = []
    for choice in found.choices[:COMPARED]:
        tick("playing whole steps")
        wholes.append(found.evaluator.play(choice.plan, choice.samples, choice.frozen)[0])
    story = Story(
        request,
        found,
        wholes,
        explore(request, found.error, tick),
        scale(request, found, tick),
        list(explain.sensitivities(request, found, tick)),
        TRACE,
    )
    pictures: list[Picture] = []
    for sheet in SHEETS:
        tick(f"drawing {sheet.name}")
        pictures.append(picture(folder, sheet, story))
    tick("writing the page")
    trace.write(
        folder / TRACE,
        {f"predicted, {describe(story.best.plan)}": [*story.spans, *trace.waits(story.spans)]},
        story.best,
    )
    with atomic_file(folder / PAGE) as unfinished:
        unfinished.write_text(render(story, pictures), encoding="utf-8")


def drawn(sheet: Sheet, story: Story, *, narrow: bool = False) -> Figure:
    """One picture, with its title and what it is about above it."""
    width = NARROW_IN if narrow else WIDTH_IN
    across = columns(width - 0.3)
    title = textwrap.wrap(sheet.title, int(TITLE_COLUMNS * across))
    noted = textwrap.wrap(note(story), across, break_on_hyphens=False)
    below = 0.12 + len(title) * LINE_IN * TITLE_PT / TEXT_PT + 0.06
    head = below + len(noted) * LINE_IN + 0.14
    height = head + (sheet.narrow_in if narrow else sheet.height_in)
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(rect=(0.005, 0.0, 0.99, 1.0 - head / height))
        figure = Figure(figsize=(width, height), layout=layout)
        top = {"fontsize": TITLE_PT, "fontweight": "bold", "va": "top"}
        figure.text(0.15 / width, 1.0 - 0.12 / height, "\n".join(title), **top)
        figure.text(0.15 / width, 1.0 - below / height, "\n".join(noted), color=GREY, va="top")
        sheet.draw(figure, story)
        for axes in figure.axes if narrow else ():
            if axes.get_xscale() == "linear":
                axes.locator_params(axis="x", nbins=NARROW_TICKS)
    return figure


def picture(folder: Path, sheet: Sheet, story: Story) -> Picture:
    """Draw one picture as SVG for the page, wide and narrow, and as PNG in the folder."""
    figure = drawn(sheet, story)
    with atomic_file(folder / f"{sheet.name}.png") as unfinished, mpl.rc_context(STYLE):
        figure.savefig(unfinished, format="png", dpi=PNG_DPI)
    return Picture(
        sheet.name, sheet.title, sheet.caption, _svg(figure, "wide"), _svg(drawn(sheet, story, narrow=True), "narrow")
    )


def _svg(figure: Figure, salt: str) -> str:
    """An element of a page; of two with other salts, none names the hatches and clips of the other."""
    svg = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):  # the same picture gives the same bytes
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = svg.getvalue()
    return text[text.index("<svg") :]


def note(story: Story) -> str:
    """What stands above every picture."""
    request = story.request
    return (
        f"PREDICTED, not measured: {request.config.name} on {request.gpus:,} GPUs of {request.cluster.name}, "
        f"{story.shapes}, {request.dtype}. Best plan: {describe(story.best.plan)}"
    )
