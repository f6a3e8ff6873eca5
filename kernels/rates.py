"""Rate classes: what share of its limit an implementation reaches (torch-free).

A class is a prediction, good enough to rank implementations; a card's tuning table replaces it by what was measured
there. Those of attention kernels stand in ``rates/CAPABILITY.yaml``, by which the cost model prices them too: its
cluster files inherit these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..documents import read_yaml
from ..errors import CinemeshError
from .tuning import DEFAULT_DEVICE, table

TABLES = Path(__file__).parent / "rates"


@dataclass(frozen=True)
class Rate:
    """Shares of ``limit`` reached, forward and backward; ``ordered``: what is left of backward with sums in order.

    ``tensor``: model FLOPs over the dense peak of bf16. ``memory``: the least bytes an op can move over the bytes
    that a copy would move in its time. ``origin``: measured, published, or why this number.
    """

    limit: Literal["tensor", "memory"]
    forward: float
    backward: float
    origin: str
    ordered: float = 1.0

    def share(self, backward: bool, ordered: bool = False) -> float:
        return self.backward * (self.ordered if ordered else 1.0) if backward else self.forward


RATES: dict[str, Rate] = {
    "matmul": Rate("tensor", 0.75, 0.75, "8192^3 bf16 with cuBLAS on an H100 SXM; usual, the shape decides"),
    "unfused": Rate("tensor", 0.02, 0.02, "the score matrix goes through memory several times"),
    "sdpa": Rate("tensor", 0.5, 0.5, "no GPU: ranks nothing"),
    "memory.fused": Rate("memory", 0.90, 0.90, "target: one pass over memory at 90 % of a copy"),
    "memory.one_pass": Rate("memory", 0.85, 0.85, "one elementwise kernel of torch"),
    "memory.passes": Rate("memory", 0.30, 0.25, "three to four passes over memory, as torch's eager ops make them"),
}


def capability_of(device: str) -> tuple[int, int] | None:
    """``cpu`` -> None, ``sm_90`` -> (9, 0); ``cuda`` is taken for an H100 where none is at hand."""
    if device == "cpu":
        return None
    digits = "90" if device == "cuda" else device.removeprefix("sm_")
    if not digits.isdecimal() or len(digits) < 2:
        raise CinemeshError(f"device {device!r} is unknown", remedy="write cpu, cuda or a capability such as sm_90")
    return int(digits[:-1]), int(digits[-1])


@lru_cache(maxsize=8)
def _chip(device: str) -> dict[str, Any]:
    """The table for a GPU: of its capability, or of the newest that is older, else the oldest."""
    known = {capability_of(path.stem) or (0, 0): path for path in TABLES.glob("sm_*.yaml")}
    own = capability_of(device) or (0, 0)
    nearest = max((capability for capability in known if capability <= own), default=min(known))
    return read_yaml(known[nearest], "the table of rates", "restore the file")


def dense_bf16_flops(device: str) -> float:
    """Peak FLOP/s of a chip's tensor cores, by its capability (``sm_90``)."""
    return 1e12 * _chip(device)["gpu"]["peak_flops"]["value"]["bfloat16"]


def _attention(name: str, device: str) -> Rate:
    """Of large attention: at the largest head dim."""
    chip = _chip(device)
    law, peak = chip["attention"][name], chip["gpu"]["peak_flops"]["value"]["bfloat16"]
    shares = {way: max(law[way]["speed"]["value"].values()) / peak for way in ("forward", "backward")}
    said = law["backward"]["speed"]
    source = chip["sources"][said["source"]]
    origin = f"{said['origin']}, {source['title']}, {source['date']}"
    return Rate("tensor", **shares, origin=origin, ordered=law["ordered"]["value"] if "ordered" in law else 1.0)


def rate(name: str, device: str, tuned: str = DEFAULT_DEVICE) -> Rate:
    """The rate class ``name`` on a chip (``cpu``, ``sm_90``), as measured on ``tuned`` where its table has it."""
    found = table(tuned)
    known = RATES[name] if name in RATES else _attention(name, device)
    if name not in found.rates:
        return known
    measured = found.rates[name]
    forward, backward = measured.get("forward", known.forward), measured.get("backward", known.backward)
    return Rate(known.limit, forward, backward, found.origin, known.ordered)
