"""The picture of what every block changes, step by step (Movie Gen, Fig. 10a), and its numbers beside it as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from ...errors import CinemeshError
from ...files import atomic_file, check_output_file
from ..written import wrote
from .recipe import SampleSection

PICTURE = ".png"


def check_change_file(path: Path) -> None:
    """Raises CinemeshError unless the picture and its numbers can be written."""
    if path.suffix != PICTURE:
        raise CinemeshError(f"--trace-change {path} is no {PICTURE} file", remedy=f"name one, change{PICTURE}")
    for file in (path, path.with_suffix(".json")):
        check_output_file(file, "--trace-change")


def write_change(path: Path, changes: Tensor, times: Sequence[float], section: SampleSection, clips: int) -> None:
    """``changes``: [steps, blocks], over so many ``clips`` that were sampled as ``section`` says, at ``times``."""
    told = {
        "schedule": section.schedule,
        "solver": section.solver,
        "guidance": section.guidance,
        "clips": clips,
        "t": [*times],
        "change": changes.tolist(),
    }
    numbers = path.with_suffix(".json")
    with atomic_file(numbers) as part:
        part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    _draw(path, changes, times, f"{clips} clip{'s' * (clips > 1)}, {section.steps} {section.schedule} steps")
    wrote(path, f"read {numbers}", "change of every block, step by step")


def _draw(path: Path, changes: Tensor, times: Sequence[float], what: str) -> None:
    import matplotlib as mpl  # a second to load, which other samples need not wait for
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    steps, blocks = changes.shape
    colours = mpl.colormaps["viridis"]
    shades = Normalize(0, max(1, blocks - 1))
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    begins = [t for t, _ in pairwise(times)]
    for axes, x, label in ((by_step, range(1, steps + 1), "step"), (by_time, begins, "t at which it begins")):
        for block in range(blocks):
            marker = "." if steps == 1 else ""
            axes.plot(x, changes[:, block], marker=marker, color=colours(shades(block)), linewidth=1.0)
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3)
    by_step.set(ylabel="change of a block: ||out - in|| / ||in||")
    figure.suptitle(f"What every block changes: {what}", fontsize=10)
    figure.colorbar(ScalarMappable(shades, colours), ax=by_time, label="block")
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
