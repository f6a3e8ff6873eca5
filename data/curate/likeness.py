"""Vectors and hashes of clips, for copies, clusters and neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from ...errors import CinemeshError
from .detectors import PACKAGE
from .embedders import EmbedderSettings
from .pictures import decode
from .rows import VECTOR, ClipRow, titled


@dataclass(frozen=True)
class EmbeddingMeasure:
    """Of every clip: the mean of its samples' vectors, of length 1. ``weights``: fingerprint of the embedder's."""

    embedder: EmbedderSettings
    weights: str

    name: ClassVar[str] = "embedding"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("samples",)
    unit: ClassVar[int] = 16
    columns: ClassVar[tuple[pa.Field, ...]] = (titled("vector", VECTOR, "of length 1"),)

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        embedder = self.embedder.build()
        made: list[ClipRow] = []
        for row in rows:
            mean = embedder.pictures([decode(data) for data in row["samples"]]).mean(0)
            made.append({"id": row["id"], "vector": (mean / max(float(np.linalg.norm(mean)), 1e-12)).tolist()})
        return made


@dataclass(frozen=True)
class HashMeasure:
    """Of every clip: imagehash's 64-bit perceptual hash of its middle sample."""

    name: ClassVar[str] = "hash"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("samples",)
    unit: ClassVar[int] = 64
    columns: ClassVar[tuple[pa.Field, ...]] = (titled("hash", pa.binary(8), "pHash of the middle sample"),)

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        try:
            import imagehash
        except ImportError as error:
            raise CinemeshError(
                "the stage copies needs the package imagehash, which is not installed",
                remedy=f"{PACKAGE}, or switch the stage off: copies: null",
            ) from error
        made: list[ClipRow] = []
        for row in rows:
            bits = imagehash.phash(decode(row["samples"][len(row["samples"]) // 2])).hash
            made.append({"id": row["id"], "hash": np.packbits(bits.reshape(-1)).tobytes()})
        return made
