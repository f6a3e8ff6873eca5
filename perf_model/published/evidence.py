"""How wrong a step's price may be: what published runs say of a chip and an attention kernel (torch-free).

``residuals.csv`` holds predicted over measured, less one, of every published step and layer of trust A, each predicted
in ways that a plan may be predicted in (:class:`Way`). A price takes the residuals of its own: its chip and its kernel
may have been measured, or its chip alone, or neither; the less of it, the more ways, and the widest counts. A bar spans
the middle nine tenths of what was measured over what was predicted, and the prediction itself: where all residuals lie
on one side, so does the bar. Written by ``tests/benchmarks/residuals.py``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from ...errors import CinemeshError
from ..clusters.cluster import Cluster, load
from ..clusters.constants import INHERITED

RESIDUALS = Path(__file__).parent / "residuals.csv"
VALIDATED = ("dgx-h100-ib400", "dgx-a100-hdr200", "h100-hbm2e-500w")  # clusters that published rows name
LEAST_ROWS, LEAST_SOURCES = 10, 2  # that a kernel on a chip needs, to be called measured
TAIL = 0.05  # of the residuals, beyond either end of a bar
ORDER_OF_MAGNITUDE = (-0.9, 9.0)


class Way(StrEnum):
    """How a published step was predicted."""

    HELD_OUT = "held_out"  # its source left out of the fit
    UNDESCRIBED = "undescribed"  # its source left out of the fit, and what is known of its software
    OTHER_CHIP = "other_chip"  # undescribed, and with another chip's parts of a peak and small constants
    OTHER_KERNEL = "other_kernel"  # and with that chip's attention, too, scaled by the peaks


SAME_CHIP = (Way.HELD_OUT, Way.UNDESCRIBED)


@dataclass(frozen=True)
class Residual:
    """``chip``: the cluster of ``VALIDATED`` that it ran on. ``error`` = predicted / measured - 1."""

    id: str
    source: str
    chip: str
    family: str
    way: Way
    error: float


@dataclass(frozen=True)
class ErrorBar:
    """The measured step lies from ``1 + low`` to ``1 + high`` of the predicted one, in nine of ten published rows."""

    low: float
    high: float
    rows: int
    says: str

    @property
    def text(self) -> str:
        """In a line."""
        rows = f" ({self.rows} rows, nine of ten)" if self.rows else ""
        return f"± -{-100 * self.low:.0f} % +{100 * self.high:.0f} %: {self.says}{rows}"


@lru_cache(maxsize=1)
def published_residuals() -> tuple[Residual, ...]:
    """All of them. Raises CinemeshError where the file is gone."""
    try:
        with RESIDUALS.open(newline="", encoding="utf-8") as file:
            lines = [line for line in file if not line.startswith("#")]
    except OSError:
        raise CinemeshError(f"there is no {RESIDUALS}", remedy="restore the file") from None
    return tuple(
        Residual(row["id"], row["source"], row["chip"], row["family"], Way(row["way"]), float(row["error"]))
        for row in csv.DictReader(lines)
    )


def bar_of(found: Sequence[Residual], says: str) -> ErrorBar:
    """The bar that residuals make."""
    ratios = sorted(1.0 / (1.0 + residual.error) - 1.0 for residual in found)
    return ErrorBar(min(0.0, _at(ratios, TAIL)), max(0.0, _at(ratios, 1.0 - TAIL)), len(found), says)


def _at(values: Sequence[float], share: float) -> float:
    """A quantile, between its two neighbours."""
    at = share * (len(values) - 1)
    low = int(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def _chip(cluster: Cluster) -> tuple[object, ...]:
    """What the price of compute follows from, attention and what a datasheet says of memory and power apart."""
    gpu = replace(cluster.gpu, name="", memory_bytes=0.0, memory_bytes_per_s=0.0, power_w=0.0)
    return gpu, cluster.matmul, cluster.stream, cluster.overlap, cluster.measured


@lru_cache(maxsize=8)
def _validated(name: str) -> Cluster:
    return load(name)


def chip_of(cluster: Cluster) -> str | None:
    """The cluster of ``VALIDATED`` whose chip a cluster has, every constant of its compute the same."""
    return next((name for name in VALIDATED if _chip(_validated(name)) == _chip(cluster)), None)


def _is_borrowed(cluster: Cluster, path: str) -> bool:
    """Whether a number is another chip's: marked so, or word for word that of a cluster here."""
    fact = cluster.facts.get(path)
    return (
        fact is None or fact.origin == INHERITED or any(_validated(name).facts.get(path) == fact for name in VALIDATED)
    )


def error_bar(cluster: Cluster, family: str) -> ErrorBar:
    """Of a step on a cluster whose attention is of a family of kernels."""
    chip, gpu = chip_of(cluster), cluster.gpu.name
    if cluster.has_placeholders("gpu"):
        return ErrorBar(*ORDER_OF_MAGNITUDE, 0, f"{gpu}: placeholders, an order of magnitude; calibrate")
    if chip is None:
        borrowed = _is_borrowed(cluster, f"attention.{family}.forward.speed")
        inherits = borrowed or any(fact.origin == INHERITED for fact in cluster.facts.values())
        says = f"{gpu}: {'inherited, ' * inherits}unvalidated; as published steps err by another chip's numbers"
        ways = (*SAME_CHIP, Way.OTHER_KERNEL if borrowed else Way.OTHER_CHIP)
        return _widest(
            [[r for r in published_residuals() if r.way is way] for way in ways],
            f"{says}{', attention too' * borrowed}",
        )
    of_chip = [[r for r in published_residuals() if r.chip == chip and r.way is way] for way in SAME_CHIP]
    own = [r for r in of_chip[0] if r.family == family]
    same = cluster.attention.get(family) == _validated(chip).attention.get(family)
    if same and len(own) >= LEAST_ROWS and len({r.source for r in own}) >= LEAST_SOURCES:
        return bar_of(own, f"{gpu} with {family} attention: published steps, their source left out of the fit")
    says = f"{gpu}, {family} attention unvalidated: published steps, their source and its software left out"
    return _widest(of_chip, says)


def _widest(groups: Sequence[Sequence[Residual]], says: str) -> ErrorBar:
    """The bar that holds those of all groups."""
    bars = [bar_of(group, says) for group in groups]
    return ErrorBar(min(b.low for b in bars), max(b.high for b in bars), len({r.id for g in groups for r in g}), says)
