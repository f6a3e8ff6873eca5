"""Validation losses beside what people prefer (Movie Gen, Fig. 15): does the system with the lower loss win?

Losses of systems can be compared where they were validated on the same held-out windows, with the same t and noise:
those of checkpoints of one run, and what ``cinemesh average --config`` says of its members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CinemeshError, did_you_mean
from ..files import atomic_file
from .net_win import NetWin
from .score import Comparison, JudgedScore

FEWEST_RANKED = 3  # pairs, for a correlation of their ranks


@dataclass(frozen=True, kw_only=True)
class PairAgainstLoss:
    """Two systems on an axis: the loss of ``lower`` is by ``gap`` below that of ``higher``; its net win over it.

    ``low``, ``high``: the interval, None of too few prompts.
    """

    lower: str
    higher: str
    gap: float
    net_win: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class AxisAgainstLoss:
    """``rank_correlation``: Spearman's, of gaps and net wins; None of fewer than three pairs, or where one is constant.

    Of pairs that share systems, so it is no test: four systems make six pairs of which three are free.
    """

    axis: str
    pairs: list[PairAgainstLoss]
    rank_correlation: float | None


def against_loss(found: JudgedScore, losses: Mapping[str, float]) -> list[AxisAgainstLoss]:
    """Of every axis with a pair whose systems both have a loss. Raises CinemeshError for a loss of no system."""
    for name, loss in losses.items():
        if name not in found.systems:
            raise CinemeshError(f"--loss {name}: no system is called so", remedy=did_you_mean(name, found.systems))
        if not math.isfinite(loss):
            raise CinemeshError(f"--loss {name}={loss}: it is no finite number", remedy="give a validation loss")
    by_axis: dict[str, list[PairAgainstLoss]] = {}
    for comparison in found.comparisons:
        if {comparison.first, comparison.second} <= losses.keys():
            by_axis.setdefault(comparison.axis, []).append(_pair(comparison, losses))
    if not by_axis:
        raise CinemeshError(
            f"--loss says those of {', '.join(losses)}, and no judged pair has both of its systems among them",
            remedy=f"give two of {', '.join(found.systems)}",
        )
    return [AxisAgainstLoss(axis=axis, pairs=pairs, rank_correlation=_ranked(pairs)) for axis, pairs in by_axis.items()]


def _pair(comparison: Comparison, losses: Mapping[str, float]) -> PairAgainstLoss:
    first, second, net = comparison.first, comparison.second, comparison.net
    gap = losses[second] - losses[first]
    if gap >= 0:
        return PairAgainstLoss(lower=first, higher=second, gap=gap, net_win=net.value, low=net.low, high=net.high)
    low, high = _negated(net)
    return PairAgainstLoss(lower=second, higher=first, gap=-gap, net_win=-net.value, low=low, high=high)


def _negated(net: NetWin) -> tuple[float | None, float | None]:
    if net.low is None or net.high is None:
        return None, None
    return -net.high, -net.low


def _ranked(pairs: Sequence[PairAgainstLoss]) -> float | None:
    gaps, wins = (_ranks([getattr(pair, name) for pair in pairs]) for name in ("gap", "net_win"))
    if len(pairs) < FEWEST_RANKED or not gaps.std() or not wins.std():
        return None
    return float(np.corrcoef(gaps, wins)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    ordered = np.sort(values)
    first, last = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (first + last + 1) / 2


def draw_against_loss(path: Path, found: Sequence[AxisAgainstLoss], losses: Mapping[str, float]) -> None:
    """A PNG: above, the systems by their losses; below, every pair's net win over how much lower the loss is."""
    from matplotlib.figure import Figure  # a second to load, which a table need not wait for

    figure = Figure(figsize=(8.0, 5.5), layout="constrained")
    line, axes = figure.subplots(2, 1, height_ratios=(1, 6))
    line.scatter(losses.values(), [0] * len(losses), marker="|", s=200, color="black")
    for name, loss in losses.items():
        line.annotate(f"{name} {loss:.4g}", (loss, 0), (0, 10), textcoords="offset points", ha="center", fontsize=8)
    line.set(yticks=[], xlabel="validation loss", ylim=(-1, 3))
    line.spines[["left", "right", "top"]].set_visible(False)
    for number, of in enumerate(found):
        gaps, wins = [pair.gap for pair in of.pairs], [100 * pair.net_win for pair in of.pairs]
        ends = [
            (100 * (p.net_win if p.low is None else p.low), 100 * (p.net_win if p.high is None else p.high))
            for p in of.pairs
        ]
        bars = [
            [w - low for w, (low, _) in zip(wins, ends, strict=True)],
            [high - w for w, (_, high) in zip(wins, ends, strict=True)],
        ]
        said = "" if of.rank_correlation is None else f", rank correlation {of.rank_correlation:+.2f}"
        axes.errorbar(gaps, wins, np.abs(bars), fmt="os^Dv<>"[number % 7], capsize=3, alpha=0.8, label=of.axis + said)
    gaps = [pair.gap for pair in found[0].pairs]
    for pair in found[0].pairs:
        left = pair.gap <= (min(gaps) + max(gaps)) / 2  # of the middle: its name goes to the right of it
        axes.annotate(
            f"{pair.lower} over {pair.higher}",
            (pair.gap, 100 * pair.net_win),
            (6 if left else -6, 4),
            textcoords="offset points",
            ha="left" if left else "right",
            fontsize=8,
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        xlabel="how much lower its validation loss is",
        ylabel="net win of the system with the lower loss, of 100 prompts",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
