"""How wrong a step's price may be: what published runs say of a chip and an attention kernel (torch-free).

``residuals.csv`` holds predicted over measured, less one, of published steps and layers of trust A and B, each
predicted in ways that a plan or a row may be predicted in (:class:`Way`). A price takes the residuals of its own: its
chip and its kernel may have been measured, or its chip alone, or neither; the less of it, the more ways, and the widest
counts. A bar spans the middle nine tenths of what was measured over what was predicted, and the prediction itself. Made
so of all sources but one, it holds fewer of that one's rows: the bar is widened by what it then lacks to hold
``COVERED`` of them; of a chip that none ran, also by what bars of all chips but one lack. Where all residuals lie on
one side, so does the bar. Written by ``tests/benchmarks/residuals.py``.
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
TAIL = 0.05  # of the residuals, beyond either end of a bar before it is widened
COVERED = 0.8  # of the rows of sources that a bar is made without
ORDER_OF_MAGNITUDE = (-0.9, 9.0)


class Way(StrEnum):
    """How a published step was predicted."""

    HELD_OUT = "held_out"  # its source left out of the fit
    UNDESCRIBED = "undescribed"  # its source left out of the fit, and what is known of its software but its day
    GAP = "gap"  # undescribed, and its row leaves one thing out (trust B); no fit has seen it
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
    """The measured step lies from ``1 + low`` to ``1 + high`` of the predicted one.

    ``widened``: the part of it, at either end, that was added to hold rows of sources that it had not seen.
    """

    low: float
    high: float
    rows: int
    says: str
    widened: float = 0.0

    @property
    def span(self) -> str:
        """Its two ends."""
        return f"± -{100 * abs(self.low):.0f} % +{100 * self.high:.0f} %"

    @property
    def text(self) -> str:
        """In a line."""
        wider = f", widened by {100 * self.widened:.0f} % for sources unseen" if self.widened >= 0.005 else ""
        rows = f" ({self.rows} rows, nine of ten{wider})" if self.rows else ""
        return f"{self.span}: {self.says}{rows}"


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
    ratios, wider = [_ratio(residual) for residual in found], _widening(found)
    low, high = _span(ratios)
    return ErrorBar(
        low - wider * (min(ratios) < 0), high + wider * (max(ratios) > 0), len({r.id for r in found}), says, wider
    )


def _ratio(residual: Residual) -> float:
    """Measured over predicted, less one."""
    return 1.0 / (1.0 + residual.error) - 1.0


def _span(ratios: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(ratios)
    return min(0.0, _at(ordered, TAIL)), max(0.0, _at(ordered, 1.0 - TAIL))


def _widening(found: Sequence[Residual]) -> float:
    """What the spans of all sources but one lack, at either end, to hold ``COVERED`` of the rows that they left out.

    Every source counts alike: the next one is as likely to be like a small one as like a large one.
    """
    lacks: list[tuple[float, float]] = []  # of a row, and its share of all
    sources = {residual.source for residual in found}
    for source in sources if len(sources) > 1 else ():
        low, high = _span([_ratio(residual) for residual in found if residual.source != source])
        own = [_ratio(residual) for residual in found if residual.source == source]
        lacks += [(max(0.0, low - ratio, ratio - high), 1.0 / len(own) / len(sources)) for ratio in own]
    held = 0.0
    for lack, share in sorted(lacks):
        held += share
        if held >= COVERED:
            return lack
    return 0.0


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
        says = f"{says}{', attention too' * borrowed}"
        of_way = [[r for r in published_residuals() if r.way is way] for way in ways]
        by_chip = [[r for r in of if r.chip == name] for of in of_way for name in VALIDATED]
        bar = _widest([of for of in by_chip if of], says)
        wider = max(_widening([replace(r, source=r.chip) for r in of]) for of in of_way)
        return ErrorBar(bar.low - wider, bar.high + wider, bar.rows, says, bar.widened + wider)
    same = cluster.attention.get(family) == _validated(chip).attention.get(family)
    return _bar_of_chip(chip, gpu, family, family if same else "")


def _bar_of_chip(chip: str, gpu: str, family: str, known: str, without: str = "") -> ErrorBar:
    """Of a chip with a kernel family, where its speeds are ``known``; made without the rows of a source."""
    seen = [r for r in published_residuals() if r.chip == chip and r.source != without]
    of_chip = [[r for r in seen if r.way is way] for way in SAME_CHIP]
    own = [r for r in of_chip[0] if r.family == known]
    if len(own) >= LEAST_ROWS and len({r.source for r in own}) >= LEAST_SOURCES:
        return bar_of(own, f"{gpu} with {family} attention: published steps, their source left out of the fit")
    says = f"{gpu}, {family} attention unvalidated: published steps, their source and its software left out"
    return _widest(of_chip, says)


def undescribed_bar(cluster: Cluster, way: Way = Way.UNDESCRIBED, without: str = "") -> ErrorBar:
    """Of a step on a cluster of which nothing is known but the day of its software; made without a source's rows.

    ``way``: ``Way.GAP`` where a row leaves something out besides.
    """
    chip = chip_of(cluster)
    seen = [r for r in published_residuals() if r.way is way and r.source != without]
    own = [r for r in seen if r.chip == chip]
    says = "published steps, their source and its software left out"
    return bar_of(own, f"{cluster.gpu.name}: {says}") if own else bar_of(seen, f"all chips: {says}")


def covered(way: Way) -> float:
    """Of the published rows predicted in a way, the part that lies within a bar made without their source's rows."""
    found = [r for r in published_residuals() if r.way is way]
    bars: dict[tuple[str, str, str], ErrorBar] = {}
    for r in found:
        key = (r.chip, r.family, r.source)
        if key not in bars:
            bars[key] = (
                _bar_of_chip(r.chip, "", r.family, r.family, without=r.source)
                if way is Way.HELD_OUT
                else undescribed_bar(_validated(r.chip), way, without=r.source)
            )
    within = [bars[r.chip, r.family, r.source] for r in found]
    return sum(bar.low <= _ratio(r) <= bar.high for r, bar in zip(found, within, strict=True)) / len(found)


def _widest(groups: Sequence[Sequence[Residual]], says: str) -> ErrorBar:
    """The bar that holds those of all groups."""
    bars = [bar_of(group, says) for group in groups]
    rows = len({r.id for group in groups for r in group})
    return ErrorBar(min(b.low for b in bars), max(b.high for b in bars), rows, says, max(b.widened for b in bars))
