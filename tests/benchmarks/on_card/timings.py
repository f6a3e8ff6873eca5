"""Stage 4: the kernels of one rank of the 30B step, what takes most of it first, without torch.compile.

Attention by every package that is there, the products of the block in forward, dgrad and wgrad, and what memory limits.
What the registry chose stands beside the price of the card's shipped cluster file. ``card.json`` is for
``calibrate --card``, which makes of it the cluster file by which later stages are priced, and the registry's table.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks.kernels_gpu import Row, card_here, document, limits_of, measure_all, shown, write
from benchmarks.on_card.cases import calls, one_rank
from benchmarks.on_card.compiled import compile_all
from benchmarks.on_card.stage import KERNELS_FILE, Here

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.tuning import device_key
from cinemesh.launch.commands.tune import launcher, usable
from cinemesh.perf_model.clusters.cards import base_of
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.compute import Compute

NEAR = 0.02  # of the time: less is no reason to choose another kernel
COMPILE_SHARE = 0.3  # of the stage's time, at most


def run(here: Here) -> None:
    card, asked = card_here(here.place), calls(here.smoke)
    until = here.until - min(5.0, 0.1 * here.left_s)
    ours = [i for i, call in enumerate(asked) if any(e.package == "triton" for e in usable(call, card.device))]
    here.note(compiled_s=compile_all(launch, ours[: 2 if here.smoke else None], here, COMPILE_SHARE * here.left_s))
    limits = limits_of(card, **({"copied": 1 << 16, "side": 64} if here.smoke else {}))
    prices = priced(here.smoke)
    rows: list[Row] = []
    for row in measure_all(asked, card, limits, until, compiled=False):
        rows.append(row)
        print(shown(row), flush=True)
        # A pretended card's file is no card's: the key makes calibrate refuse it.
        write(document(limits, rows) | ({"smoke": True} if here.smoke else {}), here.folder / KERNELS_FILE)
        here.note(kernels=summary(rows, prices, here.smoke), failed=[shown(row) for row in rows if "failed" in row])
    here.note(slower_than_another=not_the_fastest(rows), complete=time.monotonic() < until)


def launch(index: int, place: str) -> None:
    """Our kernel of a call, once: see ``compiled.py``."""
    card = card_here(place)
    call = calls(place == "cpu")[index]
    for entry in usable(call, card.device):
        if entry.package == "triton":
            launcher(entry, call, place)()


def priced(smoke: bool) -> dict[tuple[object, ...], float]:
    """Seconds of every compute record of the step on the card's shipped cluster file, by op and local sizes."""
    program = one_rank(smoke).program()
    law = Compute(load(base_of(device_key(torch.cuda.get_device_name()))), clock="isolated")
    prices: dict[tuple[object, ...], float] = {}
    for op in program.ops:
        if op.kind in OPS:
            prices.setdefault(_key(op.kind, program.label_sizes(op)), law.price(program, op).kernel_s)
    return prices


def _key(op: str, sizes: dict[str, int]) -> tuple[object, ...]:
    return (op, *sorted(sizes.items()))


def summary(rows: list[Row], prices: dict[tuple[object, ...], float], smoke: bool) -> list[dict[str, Any]]:
    """Of what the registry chose: predicted and measured seconds of one call, and what part of its limit it reached."""
    ran = "smoke" if smoke else "measured"
    return [
        {
            "call": f"{row['op']} {' '.join(f'{label}={size}' for label, size in row['sizes'].items())}",
            "package": row["package"],
            "of_limit": round(row["of_limit"], 4),
            "predicted": {"seconds": prices.get(_key(row["op"], row["sizes"]))},
            ran: {"seconds": row["seconds"]},
        }
        for row in rows
        if row["chosen"] and "seconds" in row
    ]


def not_the_fastest(rows: list[Row]) -> list[str]:
    """Calls for which another kernel, whose values are right, is faster than the one that the registry chose."""
    groups: list[list[Row]] = []  # of a call: its rows follow each other, each of another package
    for row in rows:
        key = (row["dtype"], *_key(row["op"], row["sizes"]))
        last = groups[-1] if groups else []
        same = last and (last[0]["dtype"], *_key(last[0]["op"], last[0]["sizes"])) == key
        if not same or row["package"] in [other["package"] for other in last]:
            groups.append([])
        groups[-1].append(row)
    found: list[str] = []
    for group in ([row for row in each if "seconds" in row] for each in groups):
        if not group:
            continue
        best = min(group, key=lambda row: row["seconds"])
        chosen = next((row for row in group if row["chosen"]), None)
        if chosen is not None and best["seconds"] < (1 - NEAR) * chosen["seconds"]:
            found.append(f"{shown(chosen)} | {shown(best)}")
    return found
