"""Attention alone on one GPU, over lengths, heads, samples and head dims: what its laws of time are fitted to.

    python tests/benchmarks/attention_gpu.py --out DIR [--seconds 60]
    python tests/benchmarks/attention_gpu.py --fit tests/benchmarks/results/attention_h200.json

Self-attention by every package that is there, cross-attention of 868 keys by ours and torch's, forward and backward, in
bf16, L2 flushed before each launch, median of up to seven. The JSON holds ``device``, ``date``, ``torch``, ``triton``
and ``rows``: ``op``, ``package``, sizes ``b``, ``t``, ``s``, ``h``, ``k`` and ``seconds``. It is written after every
shape, and no shape begins when the seconds are over.

``--fit`` finds, for each family and direction, the constants of the law of ``perf_model/prices/compute.py`` (speed by
head dim, tail, prologue) that give these times with the least mean relative error, and prints them with that error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from cinemesh.kernels.catalogue import candidates
from cinemesh.kernels.packages import missing
from cinemesh.perf_model.calibration.descent import descend
from cinemesh.perf_model.clusters.cluster import Cluster, load
from cinemesh.perf_model.prices.compute import AttentionCall, Compute, Direction

Row = dict[str, Any]
LENGTHS = ((36864, 73728), (18432, 18432), (4608, 73728), (9216, 9216), (4608, 4608), (2304, 2304), (768, 768))
HEADS = ((1, 12), (1, 24), (4, 12))  # samples, heads
HEAD_DIMS = (128, 64)
TEXT = 868  # keys of all captions
MOST_FLOPS = 2.5e13  # of a forward: longer ones say what these say
FACTORS = (1.3, 1.1, 1.03, 1.01)  # by which a constant is moved


def shapes() -> Iterator[tuple[bool, dict[str, int]]]:
    """Masked or not; the longest first."""
    for (t, s), (b, h), k in ((length, heads, k) for k in HEAD_DIMS for length in LENGTHS for heads in HEADS):
        if 4.0 * b * h * t * s * k <= MOST_FLOPS:
            yield False, {"b": b, "t": t, "s": s, "h": h, "k": k}
        if t != s or t == 768:
            yield True, {"b": b, "t": t, "s": TEXT, "h": h, "k": k}


def measure(folder: Path, seconds: float, place: str = "cuda") -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script
    import torch
    import triton
    from benchmarks.kernels_gpu import card_here, write

    from cinemesh.kernels.registry import function

    until = time.monotonic() + seconds
    card = card_here(place)
    rows: list[Row] = []
    head = {"device": torch.cuda.get_device_name(), "date": date.today().isoformat(), "torch": torch.__version__}
    for masked, z in shapes():
        q = torch.randn(z["t"], z["b"], z["h"], z["k"], device=card.place, dtype=torch.bfloat16)
        kv = torch.randn(z["s"], z["b"], 2, z["h"], z["k"], device=card.place, dtype=torch.bfloat16)
        do, o, dq, dkv = torch.randn_like(q), torch.empty_like(q), torch.empty_like(q), torch.empty_like(kv)
        lse = torch.empty(z["b"], z["h"], z["t"], device=card.place)
        mask = [torch.ones(z["b"], z["s"], device=card.place, dtype=torch.bool)] if masked else []
        for direction in ("attention", "attention_backward"):
            op = f"cross_{direction}" if masked else direction
            given = [q, kv, *mask] if direction == "attention" else [do, q, kv, o, lse, *mask]
            outputs = [o, lse] if direction == "attention" else [dq, dkv]
            for entry in candidates(op):
                if time.monotonic() > until:
                    return
                if entry.package in ("reference", *missing()) or "cuda" not in entry.devices:
                    continue
                kernel = function(entry)
                row = {"op": op, "package": entry.package, **z}
                try:
                    rows.append(row | {"seconds": card.time_s(lambda: kernel(given, outputs))})  # noqa: B023
                except Exception as error:  # noqa: BLE001  a kernel that fails is a row too
                    rows.append(row | {"failed": f"{type(error).__name__}: {error}"[:200]})
        write(head | {"triton": triton.__version__, "rows": rows}, folder / "attention.json")


# -- the law ----------------------------------------------------------------------------------------------------------


def fitted(rows: list[Row], base: Cluster, family: str, direction: Direction) -> dict[str, Any]:
    """Of one family and direction, from the constants of ``base``: speeds by head dim, tail and prologue."""
    law = getattr(base.attention[family], direction)
    dims = sorted({row["k"] for row in rows})
    speeds = {int(k): x for k, x in law.speed.items()}
    names = [*(f"speed.{k}" for k in dims), "tail", "prologue_s"]
    calls = [
        AttentionCall(
            direction=direction, batch=r["b"], queries=r["t"], keys=r["s"], heads=r["h"], head_dim=r["k"],
            dtype="bfloat16",
        )
        for r in rows
    ]  # fmt: skip

    def error(values: Sequence[float]) -> float:
        changed = {f"attention.{family}.{direction}.{name}": x for name, x in zip(names, values, strict=True)}
        if changed[f"attention.{family}.{direction}.tail"] > 1:
            return math.inf
        compute = Compute(base.with_(**changed), clock="isolated")
        pairs = zip(calls, rows, strict=True)
        return statistics.fmean(abs(math.log(compute.attention_s(c, family) / r["seconds"])) for c, r in pairs)

    first = [*(speeds[k] for k in dims), max(law.tail, 0.1), law.prologue_s]
    best = descend(first, error, FACTORS, gain=1e-4)
    found = dict(zip(names, best, strict=True))
    return {name: float(f"{x:.4g}") for name, x in found.items()} | {"mean_error": round(error(best), 4)}


def fit(path: Path, base: str) -> None:
    groups: defaultdict[tuple[str, Direction], list[Row]] = defaultdict(list)
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        entries = [e for e in candidates(row["op"]) if e.package == row["package"] and "cuda" in e.devices]
        if "seconds" in row and entries[0].rate_class:
            direction: Direction = "backward" if row["op"].endswith("backward") else "forward"
            groups[entries[0].rate_class, direction].append(row)
    for (family, direction), rows in groups.items():
        print(f"{family} {direction}, {len(rows)} rows: {fitted(rows, load(base), family, direction)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder for attention.json")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--fit", type=Path, help="a measured JSON")
    parser.add_argument("--base", default="h200-ib400", help="the cluster whose laws are fitted")
    options = parser.parse_args()
    if options.fit:
        fit(options.fit, options.base)
    elif options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        measure(options.out, options.seconds)
    else:
        parser.error("nothing to do; give --out DIR on a GPU, or --fit FILE")


if __name__ == "__main__":
    main()
