"""Stage 5: a handful of tiles of our attention: q in registers or not; 128 keys, 4 and 8 warps, 2 to 4 stages."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

from benchmarks.kernels_gpu import card_here
from benchmarks.on_card.cases import calls
from benchmarks.on_card.compiled import compile_all
from benchmarks.on_card.stage import Here

from cinemesh.errors import in_a_line
from cinemesh.kernels import tuning
from cinemesh.launch.commands.tune import KernelCall, launcher, usable

OPS = ("attention", "attention_backward")
KEYS = 128
WARPS, STAGES = (4, 8), (2, 3, 4)
COMPILE_SHARE = 0.5  # of the stage's time, at most

Tile = dict[str, int]
Task = tuple[str, str, str, Tile]  # op, kernel, shape class, tile


def run(here: Here) -> None:
    card = card_here(here.place)
    tasks = tiles_of(here.place)
    here.note(compiled_s=compile_all(launch, tasks[: 1 if here.smoke else None], here, COMPILE_SHARE * here.left_s))
    found: list[dict[str, Any]] = []
    ran = "smoke" if here.smoke else "measured"
    for op in OPS:
        ours = launch_of(op, here.place)
        with tuning.asked() as asked:
            ours()
        found += [{"kernel": kernel, "tile": tile, "default": True, ran: {"seconds": card.time_s(ours)}}
                  for (kernel, _), tile in asked.items()]  # fmt: skip
        for of, kernel, shape, tile in tasks:
            if of != op or time.monotonic() > here.until - 3:
                continue
            row: dict[str, Any] = {"kernel": kernel, "tile": tile, "default": False}
            try:
                with tuning.trial(kernel, shape, tile):
                    row[ran] = {"seconds": card.time_s(ours)}
            except Exception as error:  # noqa: BLE001  a tile that does not fit or compile is a row too
                row["failed"] = f"{type(error).__name__}: {in_a_line(error, lines=1)}"
            found.append(row)
            here.note(tiles=found)


def launch_of(op: str, place: str) -> KernelCall:
    """Our kernel of the step's self-attention."""
    card = card_here(place)
    call = next(call for call in calls(place == "cpu") if call.op == op)
    entry = next(entry for entry in usable(call, card.device) if entry.package == "triton")
    return launcher(entry, call, place)


def tiles_of(place: str) -> list[Task]:
    """Forward's first."""
    tasks: list[Task] = []
    for op in OPS:
        with tuning.asked() as asked:
            launch_of(op, place)()
        for (kernel, shape), default in asked.items():
            tiles = [{**default, "HELD": 1 - held}] if (held := default.get("HELD")) is not None else []
            tiles += [
                {**default, "BLOCK_KEYS": KEYS, "num_warps": warps, "num_stages": stages}
                for warps, stages in product(WARPS, STAGES)
            ]
            tasks += [(op, kernel, shape, tile) for tile in tiles if tile != default]
    return tasks


def launch(task: Task, place: str) -> None:
    """A tile, once: see ``compiled.py``."""
    op, kernel, shape, tile = task
    with tuning.trial(kernel, shape, tile):
        launch_of(op, place)()
