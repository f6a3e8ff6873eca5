"""The report of a plan: pictures, an HTML page that needs no network, and a trace of the step.

    folder/report.html   plans.png   step.png   block.png   memory.png   landscape.png   scaling.png   step.trace.json

Every picture tells kinds apart by hatch or marker as well as by colour, and says that it is predicted.
"""

from __future__ import annotations

import io
import math
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
from ..search.evaluator import Evaluator
from ..search.planner import Search
from ..search.request import Request
from . import explain, trace
from .draw_plans import draw_landscape, draw_scaling, draw_terms
from .draw_step import GREY, draw_block, draw_memory, draw_step
from .explain import CHANGES, Tick, describe
from .landscape import deals, explore, scale, sizes
from .page import Picture, Story, render

COMPARED = 5  # plans whose step is taken apart side by side
WIDTH_IN = 13.5  # of every picture
HEAD_IN = 0.85  # above the axes: title and note
NOTE_COLUMNS = 160
TRACE = "step.trace.json"
PAGE = "report.html"
PNG_DPI = 110
TEXT_PT = 9.0  # of all text in a picture; the page shows it at 11 pixels at least
LEAST_PX = 11.0
POINTS_PER_IN = 72
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
    "svg.hashsalt": "cinemesh",  # the same picture gives the same bytes
}


@dataclass(frozen=True)
class Sheet:
    """A picture to draw: what it is called, says and shows. Width and height in inches."""

    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Figure, Story], None]


SHEETS = (
    Sheet(
        "plans",
        "Where the time of a sample goes",
        "GPU-seconds of one sample by term, for the plans at the top of the table, the best one first.",
        (WIDTH_IN, 5.0),
        lambda figure, story: draw_terms(figure, story.wholes),
    ),
    Sheet(
        "step",
        "The step, lane by lane",
        "How busy every lane is over the step. Crossed areas of the compute lane are exposed waits.",
        (WIDTH_IN, 8.5),
        lambda figure, story: draw_step(figure, story.spans, story.best.timeline.step_s),
    ),
    Sheet(
        "block",
        "One block, forward and backward",
        "Every record of a block in the middle of the model. Crossed bars are exposed waits; records that are made "
        "again in backward are hatched.",
        (WIDTH_IN, 10.5),
        lambda figure, story: draw_block(figure, story.spans, story.request.config.layers // 2),
    ),
    Sheet(
        "memory",
        "Memory of one GPU over the step",
        "Live bytes by class, exact for what the program owns.",
        (WIDTH_IN, 6.5),
        lambda figure, story: draw_memory(figure, story.best),
    ),
    Sheet(
        "landscape",
        "Plans over global batches",
        "Above: the best plan of each family, with its step time; bands are neutral groups. Below: which sizes of a "
        "model-parallel group fit into memory at which batch, and the GB that the others need with full recompute.",
        (WIDTH_IN, 9.0),
        lambda figure, story: draw_landscape(figure, story.landscape, story.found.best),
    ),
    Sheet(
        "scaling",
        "Scaling: the best plan of every number of GPUs",
        "Each point: degrees, shard group x replicas, step time. The global batch is left open.",
        (WIDTH_IN, 6.0),
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
    evaluator, wholes = Evaluator(request), list[PlayedStep]()
    for choice in found.choices[:COMPARED]:
        tick("playing whole steps")
        wholes.append(evaluator.play(choice.plan, choice.samples, choice.frozen)[0])
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


def drawn(sheet: Sheet, story: Story) -> Figure:
    """One picture, with its title and what it is about above it."""
    with mpl.rc_context(STYLE):
        width, height = sheet.size
        layout = ConstrainedLayoutEngine(rect=(0.005, 0.0, 0.99, 1.0 - HEAD_IN / height))
        figure = Figure(figsize=(width, height), layout=layout)
        figure.text(0.15 / width, 1.0 - 0.12 / height, sheet.title, fontsize=12, fontweight="bold", va="top")
        figure.text(0.15 / width, 1.0 - 0.38 / height, note(story), color=GREY, va="top")
        sheet.draw(figure, story)
    return figure


def picture(folder: Path, sheet: Sheet, story: Story) -> Picture:
    """Draw one picture as SVG for the page, and as PNG in the folder."""
    with mpl.rc_context(STYLE):  # hatches are drawn when the figure is saved
        figure = drawn(sheet, story)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        with atomic_file(folder / f"{sheet.name}.png") as unfinished:
            figure.savefig(unfinished, format="png", dpi=PNG_DPI)
    least_px = math.ceil(sheet.size[0] * POINTS_PER_IN * LEAST_PX / TEXT_PT)
    return Picture(sheet.name, sheet.title, sheet.caption, svg.getvalue(), least_px)


def note(story: Story) -> str:
    """What stands above every picture."""
    request = story.request
    return textwrap.fill(
        f"PREDICTED, not measured: {request.config.name} on {request.gpus:,} GPUs of {request.cluster.name}, "
        f"{story.shapes}, {request.dtype}. Best plan: {describe(story.best.plan)}",
        NOTE_COLUMNS,
        break_on_hyphens=False,
    )
