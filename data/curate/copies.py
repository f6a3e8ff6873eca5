"""Perceptual copies: of clips that show the same, the best one stays.

First by hash (re-encodes, other sizes), then by the embedder's cosine (crops, a few frames earlier or later). The
paper's 0.99 is SSCD's (Table 38); another embedder has its own threshold, which planted copies calibrate: of the
shipped one they begin at 0.95, but for heavy JPEG, which the hash finds, and different scenes end at 0.61.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import numpy as np

from ...errors import CinemeshError
from ...ranges import check_ranges, integers, reals
from .detectors import PACKAGE
from .rows import ClipRow

Cosine = Annotated[float, reals(0.01, 1, "a cosine of what is alike")]
Bits = Annotated[int, integers(0, 32, "of 64 bits, half differ by chance", "bits")]
HASH_BITS = 64


@dataclass(frozen=True)
class Copies:
    """Alike: hashes that differ in ``most_bits`` at most (null: hashes are not asked), or vectors of ``cosine``.

    ``embedder``: the kind whose threshold ``cosine`` is; it must be that of ``measure.copies``.
    """

    cosine: Cosine = 0.99
    embedder: str = "sscd"
    most_bits: Bits | None = None

    needs: ClassVar[str] = "copies"

    def __post_init__(self) -> None:
        check_ranges(self, "copies.")

    def dropped(
        self, rows: Sequence[ClipRow], vectors: Mapping[str, Any], hashes: Mapping[str, bytes]
    ) -> dict[str, str]:
        """By id, of which other row it is a copy. The one with most pixels stays, then the longest, the first file."""
        order = sorted(rows, key=lambda row: (-row["width"] * row["height"], -row["seconds"], row["file"], row["id"]))
        if len(order) < 2:
            return {}
        faiss = faiss_of("copies")
        found = np.array([vectors[row["id"]] for row in order], np.float32)
        flat = faiss.IndexFlatIP(found.shape[1])
        flat.add(found)
        limits, cosines, others = flat.range_search(found, self.cosine - 1e-6)
        near: list[list[tuple[int, str]]] = [
            [(int(j), f"cosine {value:.3f}") for j, value in zip(others[a:b], cosines[a:b], strict=True)]
            for a, b in pairwise(limits)
        ]
        if self.most_bits is not None:
            bits = np.frombuffer(b"".join(hashes[row["id"]] for row in order), np.uint8).reshape(-1, HASH_BITS // 8)
            binary = faiss.IndexBinaryFlat(HASH_BITS)
            binary.add(bits)
            limits, apart, others = binary.range_search(bits, self.most_bits + 1)  # below, not up to
            for i, (a, b) in enumerate(pairwise(limits)):
                near[i] += [(int(j), f"{int(d)} bits apart") for j, d in zip(others[a:b], apart[a:b], strict=True)]
        made: dict[str, str] = {}
        for i, row in enumerate(order):
            if row["id"] in made:
                continue  # what stays is compared with what stays: no chain of likenesses
            for j, how in near[i]:
                if j > i:
                    made.setdefault(order[j]["id"], f"a copy of {row['id']} ({how})")
        return made


def faiss_of(stage: str) -> Any:
    """The package, with one thread: its sums then have one order. Raises CinemeshError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise CinemeshError(
            f"the stage {stage} needs the package faiss-cpu, which is not installed",
            remedy=f"{PACKAGE}, or switch the stage off: {stage}: null",
        ) from error
    faiss.omp_set_num_threads(1)
    return faiss
