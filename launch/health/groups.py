"""Ranks told by what they have in common: ``0-3, 7`` (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def by_value(of_ranks: Mapping[int, str]) -> dict[str, str]:
    """The ranks that have each value, as ``0-3, 7``."""
    found: dict[str, list[int]] = {}
    for rank, value in of_ranks.items():
        found.setdefault(value, []).append(rank)
    return {value: ranks_text(ranks) for value, ranks in found.items()}


def ranks_text(ranks: Sequence[int]) -> str:
    """Ascending ranks as ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
