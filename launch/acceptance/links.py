"""Stage 4: the times of collectives, one by one and replayed in a CUDA Graph, as ``cinemesh calibrate`` reads them.

Groups lie as those of plans do (``launch/commands/measure_links.py``). A CPU has no graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ...perf_model.acceptance import CAPTURED, TESTS
from ..commands import measure_links
from ..commands.measure_links import link_groups, measure_group
from .here import SAID, Here
from .steps import device_kind

CPU_SIZES = tuple(2**power for power in (12, 16, 20))  # bytes
LEAST = 0.02  # of the whole time, that must be left for one more kind of group


def run(here: Here) -> None:
    """Every kind of group timed, both ways; a job of one rank has none."""
    if here.world == 1:
        here.note(**{TESTS: [], SAID: "one rank has no links"})
        return
    with here.joined() as place:
        on_gpu = device_kind(place.device) == "cuda"
        sizes = measure_links.SIZES if on_gpu else CPU_SIZES
        ways = {TESTS: False, CAPTURED: True} if on_gpu else {TESTS: False}
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        groups = [*link_groups(here.world, here.local)]
        for number, group in enumerate(groups):
            if not here.time_for(LEAST):
                here.fault(f"no time was left for {len(groups) - number} of {len(groups)} kinds of groups")
                break
            for way, captured in ways.items():
                begin = partial(_begin, here, captured)
                tests = measure_group(group, place.device, "the job", sizes, captured=captured, begin=begin)
                found[way] += [asdict(test) for test in tests]
                here.note(**found)
        if found[TESTS]:
            here.note(**{SAID: said_of(found[TESTS])})


def said_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many, and the rate of the largest all_gather over most ranks."""
    last = [row for row in rows if row["kind"] == "all_gather"][-1]
    size, seconds = max(last["seconds"].items())
    rate = size * (last["ranks"] - 1) / last["ranks"] / seconds
    return f"{len(rows)} collectives; all_gather over {last['ranks']} ranks: {rate / 1e9:.3g} GB/s"


def _begin(here: Here, captured: bool, what: str) -> None:
    here.at(f"{what}{', in a graph' * captured}")
