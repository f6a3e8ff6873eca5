"""A cluster file from one measured card: what ``kernels_gpu.py`` wrote, over a shipped cluster (torch-free).

And the card's tuning table (:func:`write_table`): the rates by which kernels are chosen there, and then priced.

The card's copy bandwidth sets the reached part of the memory's rate. Its large bf16 product, and the attention kernels
of the step's longest call in each direction, scale the laws of the base cluster so that they predict what was measured
(``tests/benchmarks/kernels_gpu.py``). The file says which packages were there. Links, memory and everything else stay
the base's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...documents import mapping, quoted, read_json, write_yaml
from ...errors import CinemeshError
from ...kernels import tuning
from ...kernels.catalogue import OPTIONAL, candidates
from ...kernels.rates import dense_bf16_flops
from ...ranges import Range, integers, reals
from ..clusters.cluster import Cluster, load, over, write_cluster
from ..prices.compute import AttentionCall, Compute, Direction

SIDE = 8192  # of the square product that the benchmark times
WRONG = 0.02  # of the reference's largest value: a kernel that differs by more is not counted
DIRECTIONS: dict[str, Direction] = {"attention": "forward", "attention_backward": "backward"}


_POSITIVE = reals(0, 1e18, "it is a rate, a time or a count of FLOPs", above=True)
_PART = integers(0, 99, "it is a part of a compute capability")
_ERROR = reals(0, 1e30, "it is a share of a largest value")
_SIZE = integers(1, 2**40, "it counts samples, tokens, heads or values")
_MEASURED = ("device", "date", "copy_bytes_per_s", "matmul_flops_per_s", "kernels")
_KERNEL = (
    *("op", "package", "dtype", "sizes", "calls", "flops", "bytes", "limit", "chosen"),
    *("failed", "seconds", "of_limit", "error"),
)
_LABELS = "btshk"  # of attention: samples, queries, keys, heads, head dim; beside them c, which counts K and V
_REMEDY = "give the JSON that kernels_gpu.py wrote"


def _read(path: Path) -> dict[str, Any]:
    """The benchmark's JSON; of its kernels, those that ran, their numbers checked."""
    where = f"the card {path}"
    values = read_json(path, "the card", _REMEDY)
    mapping(values, where, (*_MEASURED, "capability", "torch", "triton"), required=_MEASURED, remedy=_REMEDY)
    for key in ("device", "date"):
        if not isinstance(values[key], str):
            raise CinemeshError(f"{where}: {key} is {quoted(values[key])}", remedy="it must be a text")
    for key in ("copy_bytes_per_s", "matmul_flops_per_s"):
        _check(f"{where}: {key}", _POSITIVE, values[key])
    parts = values.get("capability", [0, 0])
    if not isinstance(parts, list) or len(parts) != 2:
        raise CinemeshError(f"{where}: capability is {quoted(parts)}", remedy="write for example [9, 0]")
    for part in parts:
        _check(f"{where}: capability", _PART, part)
    if not isinstance(values["kernels"], list):
        raise CinemeshError(f"{where}: kernels is {quoted(values['kernels'])}", remedy=_REMEDY)
    ran: list[dict[str, Any]] = []
    for number, row in enumerate(values["kernels"], 1):
        at = f"{where}: kernel {number}"
        row = {"error": 0.0} | mapping(row, at, _KERNEL, required=("op",), remedy=_REMEDY)
        if "failed" in row or row["op"] not in [*DIRECTIONS]:
            continue
        mapping(row, at, row, required=("package", "sizes", "flops", "seconds"), remedy=_REMEDY)
        if not isinstance(row["package"], str):
            raise CinemeshError(f"{at}: package is {quoted(row['package'])}", remedy="it must be a text")
        for key in ("seconds", "flops"):
            _check(f"{at}: {key}", _POSITIVE, row[key])
        _check(f"{at}: error", _ERROR, row["error"])
        sizes = mapping(row["sizes"], f"{at}: sizes", f"{_LABELS}c", required=_LABELS, remedy=_REMEDY)
        for label in _LABELS:
            _check(f"{at}: sizes.{label}", _SIZE, sizes[label])
        ran.append(row)
    return values | {"kernels": ran}


def _check(what: str, allowed: Range, value: object) -> None:
    if must := allowed.wrong(value):
        raise CinemeshError(f"{what} is {quoted(value)}", remedy=must)


def _attention(values: dict[str, Any], compute: Compute) -> dict[tuple[str, Direction], float]:
    """By family and direction: measured rate over the predicted one, of the longest call, where it was right."""
    ratios: dict[tuple[str, Direction], float] = {}
    for op, direction in DIRECTIONS.items():
        families = {e.package: e.rate_class for e in candidates(op) if e.rate_class in compute.cluster.attention}
        for row in _longest(values, op):
            if row["package"] not in families:
                continue
            z, family = row["sizes"], families[row["package"]]
            call = AttentionCall(
                direction=direction,
                batch=z["b"],
                queries=z["t"],
                keys=z["s"],
                heads=z["h"],
                head_dim=z["k"],
                dtype="bfloat16",
            )
            ratios[family, direction] = compute.attention_s(call, family) / row["seconds"]
    return ratios


def _longest(values: dict[str, Any], op: str) -> list[dict[str, Any]]:
    """Kernels of the call of an op that has most FLOPs, those that were right."""
    rows = [row for row in values["kernels"] if row["op"] == op and row["error"] <= WRONG]
    longest = max((row["flops"] for row in rows), default=0)
    return [row for row in rows if row["flops"] == longest]


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
        "sources": {
            "card": {
                "title": f"tests/benchmarks/kernels_gpu.py on {values['device']}: bf16, and one head dim of attention; "
                "other dtypes as the base has them, other head dims in the base's ratio",
                "date": values["date"],
            }
        },
        "packages": [name for name in OPTIONAL if name in {row["package"] for row in values["kernels"]}],
        "matmul": {"efficiency": measured(efficiency, "fraction")},
        "stream": {"fraction": measured(fraction, "fraction")},
    }
    for (family, direction), ratio in _attention(values, compute).items():
        law = getattr(base.attention[family], direction)
        speeds = {int(dim): speed * ratio / 1e12 for dim, speed in law.speed.items()}
        made.setdefault("attention", {}).setdefault(family, {})[direction] = {"speed": measured(speeds, "TFLOP/s")}
    return write_yaml(over(base_name, made))


def write(source: Path, base_name: str, out: Path) -> Cluster:
    """Read the benchmark's JSON, write the cluster file, and return it as it is read back.

    Raises CinemeshError for a file that is not the benchmark's, and for numbers that no card has.
    """
    values, base = _read(source), load(base_name)
    if base.nccl is None:
        raise CinemeshError(
            f"card: {base_name} is no GPU cluster", remedy="name the one whose links and memory the card has"
        )
    return write_cluster(out, text_of(values, base, base_name, out.stem))


def write_table(source: Path, out: Path) -> tuning.Table:
    """Write the registry's table of the card: measured shares of its peak, and the tiles that were known before.

    It is read where it lies in ``kernels/tuning`` under the card's name. Raises CinemeshError as :func:`write` does.
    """
    values = _read(source)
    if "capability" not in values:
        raise CinemeshError(f"the card {source} has no capability", remedy=_REMEDY)
    major, minor = values["capability"]
    peak = dense_bf16_flops(f"sm_{major}{minor}")
    known = tuning.table(tuning.device_key(values["device"]))
    rates = {rate_class: dict(shares) for rate_class, shares in known.rates.items()}
    for op, direction in DIRECTIONS.items():
        here = (e for e in candidates(op) if "cuda" in e.devices and e.package != "reference")
        classes = {entry.package: entry.rate_class for entry in here}
        for row in _longest(values, op):
            if row["package"] in classes:
                share = row["flops"] / row["seconds"] / peak
                rates.setdefault(classes[row["package"]], {})[direction] = round(share, 4)
    origin = f"measured on {values['device']}, {values['date']}"
    table = replace(known, device=values["device"], origin=origin, rates=rates)
    tuning.write(table, out)
    return table
