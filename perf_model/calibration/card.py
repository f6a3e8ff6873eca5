"""A cluster file from one measured card: what ``kernels_gpu.py`` wrote, over a shipped cluster (torch-free).

The card's copy bandwidth sets the reached part of the memory's rate. Its large bf16 product, and the fastest attention
of the step's longest call in each direction, scale the laws of the base cluster so that they predict what was measured
(``tests/benchmarks/kernels_gpu.py``). Links, memory and everything else stay the base's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ...errors import CinemeshError
from ...files import atomic_file
from ..clusters.cluster import Cluster, load
from ..prices.compute import AttentionCall, Compute, Direction

SIDE = 8192  # of the square product that the benchmark times
DIRECTIONS: dict[str, Direction] = {"attention": "forward", "attention_backward": "backward"}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CinemeshError(
            f"card: {path} cannot be read ({error})", remedy="give the JSON that kernels_gpu.py wrote"
        ) from None
    wanted = ("device", "date", "copy_bytes_per_s", "matmul_flops_per_s", "kernels")
    lacking = [key for key in wanted if not isinstance(values, dict) or key not in values]
    if lacking:
        raise CinemeshError(
            f"card: {path} has no {', '.join(lacking)}", remedy="give the JSON that kernels_gpu.py wrote"
        )
    for key in wanted[2:4]:
        if not isinstance(values[key], (int, float)) or not values[key] > 0:
            raise CinemeshError(
                f"card: {key} of {path} is {values[key]!r}, it must be a positive number", remedy="measure again"
            )
    return values


def _attention(values: dict[str, Any], compute: Compute) -> dict[str, float]:
    """By direction: measured rate over the predicted one, of the longest call's fastest kernel that was right."""
    ratios: dict[str, float] = {}
    for op, direction in DIRECTIONS.items():
        rows = [k for k in values["kernels"] if k["op"] == op and not k.get("wrong") and k["seconds"] > 0]
        if not rows:
            continue
        longest = max(row["flops"] for row in rows)
        seconds = min(row["seconds"] for row in rows if row["flops"] == longest)
        z = next(row["sizes"] for row in rows if row["flops"] == longest)
        predicted = compute.attention_s(
            AttentionCall(
                direction=direction,
                batch=z["b"],
                queries=z["t"],
                keys=z["s"],
                heads=z["h"],
                head_dim=z["k"],
                dtype="bfloat16",
            )
        )
        ratios[direction] = predicted / seconds
    return ratios


def text_of(values: dict[str, Any], base: Cluster, base_name: str, name: str) -> str:
    """The cluster file as YAML."""
    compute = Compute(base, clock="isolated")
    product = 2.0 * SIDE**3 / compute.matmul_s(SIDE, SIDE, SIDE, "bfloat16")
    efficiency = dict(base.matmul.efficiency)
    efficiency["bfloat16"] = min(1.0, efficiency["bfloat16"] * values["matmul_flops_per_s"] / product)
    fraction = min(1.0, values["copy_bytes_per_s"] / base.gpu.memory_bytes_per_s)

    def measured(value: object, unit: str) -> dict[str, object]:
        return {"value": value, "unit": unit, "origin": "measured", "source": "card"}

    made: dict[str, Any] = {
        "name": name,
        "about": f"{base.about}; kernels as measured on {values['device']}",
        "base": [base_name],
        "sources": {
            "card": {"title": f"tests/benchmarks/kernels_gpu.py on {values['device']}", "date": values["date"]}
        },
        "matmul": {"efficiency": measured(efficiency, "fraction")},
        "stream": {"fraction": measured(fraction, "fraction")},
    }
    family = compute.family
    for direction, ratio in _attention(values, compute).items():
        law = getattr(base.attention[family], direction)
        speeds = {int(dim): speed * ratio / 1e12 for dim, speed in law.speed.items()}
        made.setdefault("attention", {}).setdefault(family, {})[direction] = {"speed": measured(speeds, "TFLOP/s")}
    return yaml.safe_dump(made, sort_keys=False)


def write(source: Path, base_name: str, out: Path) -> Cluster:
    """Read the benchmark's JSON, write the cluster file, and return it as it is read back.

    Raises CinemeshError for a file that is not the benchmark's, and for numbers that no card has.
    """
    values, base = _read(source), load(base_name)
    if base.nccl is None:
        raise CinemeshError(
            f"card: {base_name} is no GPU cluster", remedy="name the one whose links and memory the card has"
        )
    with atomic_file(out) as unfinished:
        unfinished.write_text(text_of(values, base, base_name, out.stem))
    return load(str(out))
