"""Clusters of what clips show, and resampling by one over the root of their sizes.

k-means over the embedder's vectors, then clusters whose centres are alike become one. A clip of a cluster of ``n``
stays with a chance of ``c / sqrt(n)``, at most 1, with ``c`` such that ``share`` of all stay: of a cluster,
``c sqrt(n)`` are expected (Movie Gen, Table 38, last row). Protected classes stay whole. What is drawn belongs to a
clip's id.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import CinemeshError
from ...ranges import SEED_RANGE, check_ranges, integers, reals
from .copies import Cosine, faiss_of
from .rows import ClipRow, draw_of

ROUNDS = 25  # of k-means; it rarely moves after ten
CLOSE = 1e-9  # of bisection
Clusters = Annotated[int, integers(1, 10**6, "each has a centre")]
KeptShare = Annotated[float, reals(0.01, 1, "a share of the clips")]


@dataclass(frozen=True)
class Resample:
    """``clusters``: of k-means; null: the root of half the clips. ``merge``: cosine of centres that become one.

    ``share``: of the clips that stay; null: all stay, and each has a weight of 1 / sqrt(n) instead, of mean 1.
    ``protect``: by column, values of which every clip stays: ``{camera: [zoom in, arc]}``.
    """

    clusters: Clusters | None = None
    merge: Cosine | None = None
    share: KeptShare | None = None
    seed: Annotated[int, SEED_RANGE] = 0
    protect: dict[str, tuple[str, ...]] | None = None

    needs: ClassVar[str] = "clusters"

    def __post_init__(self) -> None:
        check_ranges(self, "resample.")
        for name in self.protect or {}:
            if name not in PROTECTED_BY:
                raise CinemeshError(
                    f"resample.protect has {name!r:.100}", remedy=f"it names a column of {', '.join(PROTECTED_BY)}"
                )

    def clustered(self, rows: Sequence[ClipRow], vectors: Mapping[str, Any]) -> dict[str, int]:
        """By id, the number of its cluster; the largest is 0."""
        if not rows:
            return {}
        ids = [row["id"] for row in rows]
        found = np.array([vectors[each] for each in ids], np.float32)
        count = min(len(ids), self.clusters or max(1, round(math.sqrt(len(ids) / 2))))
        faiss = faiss_of("resample")
        kmeans = faiss.Kmeans(
            found.shape[1], count, niter=ROUNDS, seed=1, spherical=True, min_points_per_centroid=1,
            max_points_per_centroid=10**9,
        )  # fmt: skip
        kmeans.train(found)
        assigned = kmeans.index.search(found, 1)[1][:, 0]
        merged = _merged(np.asarray(kmeans.centroids), self.merge)[assigned]
        sizes = Counter(merged.tolist())
        order = sorted(sizes, key=lambda label: (-sizes[label], ids[int(np.argmax(merged == label))]))
        number = {label: index for index, label in enumerate(order)}
        return {each: number[label] for each, label in zip(ids, merged.tolist(), strict=True)}

    def chances(self, rows: Sequence[ClipRow], clusters: Mapping[str, int]) -> dict[str, float]:
        """By id, the chance to stay; 1 of protected ones."""
        sizes = Counter(clusters[row["id"]] for row in rows)
        free = [row for row in rows if not self.is_protected(row)]
        roots = np.array([1 / math.sqrt(sizes[clusters[row["id"]]]) for row in free])
        scale = _scale(roots, (self.share or 1.0) * len(rows) - (len(rows) - len(free)))
        chances = dict(zip((row["id"] for row in free), np.minimum(1.0, scale * roots).tolist(), strict=True))
        return {row["id"]: chances.get(row["id"], 1.0) for row in rows}

    def dropped(self, rows: Sequence[ClipRow], clusters: Mapping[str, int]) -> dict[str, str]:
        """By id, of those that were not drawn."""
        if self.share is None:
            return {}
        sizes = Counter(clusters[row["id"]] for row in rows)
        return {
            each: f"not drawn: cluster {clusters[each]} has {sizes[clusters[each]]} clips, chance {chance:.2f}"
            for each, chance in self.chances(rows, clusters).items()
            if draw_of(self.seed, "resample", each) >= chance
        }

    def weights(self, rows: Sequence[ClipRow], clusters: Mapping[str, int]) -> dict[str, float]:
        """By id, how often it is to be drawn in training: 1 of all where ``share`` decided already."""
        if self.share is not None or not rows:
            return {row["id"]: 1.0 for row in rows}
        sizes = Counter(clusters[row["id"]] for row in rows)
        roots = {
            row["id"]: 1.0 if self.is_protected(row) else 1 / math.sqrt(sizes[clusters[row["id"]]]) for row in rows
        }
        mean = sum(roots.values()) / len(roots)
        return {each: root / mean for each, root in roots.items()}

    def is_protected(self, row: ClipRow) -> bool:
        """Whether a clip stays whatever is drawn."""
        return any(row.get(name) in values for name, values in (self.protect or {}).items())


PROTECTED_BY = ("camera", "camera_by_hand", "concept")


def _merged(centres: NDArray[np.float32], cosine: float | None) -> NDArray[np.int64]:
    """For each centre, the first of those that are alike, over any chain of them."""
    labels = np.arange(len(centres))
    if cosine is None:
        return labels
    near = centres @ centres.T >= cosine
    for i in range(len(centres)):
        for j in np.flatnonzero(near[i, :i]):
            labels[labels == labels[i]] = min(labels[i], labels[j])
    return labels


def _scale(roots: NDArray[np.float64], wanted: float) -> float:
    """``c`` for which the sum of min(1, c * roots) is ``wanted``; 0 where none are wanted, all where all are."""
    if wanted <= 0 or not len(roots):
        return 0.0
    low, high = 0.0, 1 / float(roots.min())
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * roots).sum() < wanted else (low, middle)
    return high
