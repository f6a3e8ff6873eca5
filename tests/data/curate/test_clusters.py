"""Clusters and what is drawn of them, against the binomial law; planted protected classes stay whole."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from cinemesh.data.curate.clusters import Resample

SIZES = (400, 900, 100, 1600)
WIDTH = 16


def made(seed: int = 0) -> tuple[list[dict[str, object]], dict[str, np.ndarray], dict[str, int]]:
    """Clips of four concepts, vectors close to one of four directions, and which."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    vectors: dict[str, np.ndarray] = {}
    truth: dict[str, int] = {}
    for concept, size in enumerate(SIZES):
        for number in range(size):
            name = f"{concept}-{number}"
            vector = 0.05 * random.standard_normal(WIDTH)
            vector[concept] += 1
            vectors[name] = (vector / np.linalg.norm(vector)).astype(np.float32)
            rows.append({"id": name, "camera": "arc" if number % 10 == 0 and concept == 3 else None})
            truth[name] = concept
    return rows, vectors, truth


def test_clusters_are_the_concepts_the_largest_first() -> None:
    """Twelve centres merge into four."""
    rows, vectors, truth = made()
    found = Resample(clusters=12, merge=0.9).clustered(rows, vectors)
    pairs = {(truth[each], cluster) for each, cluster in found.items()}
    assert pairs == {(3, 0), (1, 1), (0, 2), (2, 3)}


def test_without_merging_there_are_as_many_as_were_asked() -> None:
    rows, vectors, _ = made()
    assert len(set(Resample(clusters=12).clustered(rows, vectors).values())) == 12


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_follows_one_over_the_root(seed: int) -> None:
    """Of a cluster of n, c sqrt(n) are expected, and what is drawn lies within three deviations."""
    rows, _, truth = made()
    rule = Resample(share=0.3, seed=seed)
    chances = rule.chances(rows, truth)
    gone = rule.dropped(rows, truth)
    kept = Counter(truth[str(row["id"])] for row in rows if row["id"] not in gone)
    scale = 0.3 * sum(SIZES) / sum(map(math.sqrt, SIZES))
    for concept, size in enumerate(SIZES):
        chance = scale / math.sqrt(size)
        assert chances[f"{concept}-0"] == pytest.approx(chance, rel=1e-6) and chance < 1
        assert abs(kept[concept] - size * chance) <= 3 * math.sqrt(size * chance * (1 - chance))
    total = math.sqrt(sum(s * scale / math.sqrt(s) * (1 - scale / math.sqrt(s)) for s in SIZES))
    assert abs(kept.total() - 0.3 * len(rows)) <= 3 * total


def test_a_uniform_draw_would_be_found() -> None:
    """The bound above separates 1/sqrt(n) from keeping 30 % of everything."""
    scale = 0.3 * sum(SIZES) / sum(map(math.sqrt, SIZES))
    off = [abs(0.3 * s - scale * math.sqrt(s)) / math.sqrt(0.3 * 0.7 * s) for s in SIZES]
    assert max(off) > 6


def test_chances_end_at_one() -> None:
    """Where c / sqrt(n) would pass 1, the rest is taken of the larger clusters."""
    rows, _, truth = made()
    chances = Resample(share=0.8).chances(rows, truth)
    assert chances["2-0"] == chances["0-0"] == 1 and chances["3-0"] < 1
    assert sum(chances.values()) == pytest.approx(0.8 * len(rows), rel=1e-6)


def test_protected_classes_stay_exactly() -> None:
    rows, _, truth = made()
    rule = Resample(share=0.3, protect={"camera": ("arc",)})
    dropped = rule.dropped(rows, truth)
    arcs = [row["id"] for row in rows if row["camera"] == "arc"]
    assert len(arcs) == 160 and not dropped.keys() & set(arcs)
    assert Resample(share=0.3).dropped(rows, truth).keys() & set(arcs)  # unprotected, some would go
    assert sum(rule.chances(rows, truth).values()) == pytest.approx(0.3 * len(rows), rel=1e-6)


def test_a_draw_belongs_to_its_clip() -> None:
    """Fewer clips of the same clusters: with one chance, the same ones stay."""
    rows, _, truth = made()
    rule = Resample(share=0.3)
    order = rule.dropped(rows, truth)
    assert rule.dropped(rows[::-1], truth) == order
    assert Resample(share=0.3, seed=1).dropped(rows, truth).keys() != order.keys()


def test_weights_stand_in_for_a_draw() -> None:
    rows, _, truth = made()
    weights = Resample().weights(rows, truth)
    assert weights["0-0"] / weights["3-0"] == pytest.approx(2) and np.mean([*weights.values()]) == pytest.approx(1)
    assert set(Resample(share=0.5).weights(rows, truth).values()) == {1.0}
