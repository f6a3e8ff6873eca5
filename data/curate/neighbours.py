"""Neighbours of hand-picked clips: how a set for fine-tuning grows from seeds (Movie Gen, 3.3: text k-NN, then clips).

Seeds are a YAML list: ids of clips as ``clips.parquet`` has them, and texts where the joint embedder knows any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from ...documents import read_yaml
from ...errors import CinemeshError
from ...ranges import check_ranges, integers
from .copies import faiss_of
from .rows import ClipRow

Nearest = Annotated[int, integers(1, 10**6, "neighbours of a seed", "clips")]


@dataclass(frozen=True)
class Neighbours:
    """Each seed keeps the ``k`` clips that are most like it."""

    seeds: str
    k: Nearest = 100

    needs: ClassVar[str] = "joint"

    def __post_init__(self) -> None:
        check_ranges(self, "neighbours.")

    def dropped(
        self, rows: Sequence[ClipRow], vectors: Mapping[str, Any], texts: Callable[[Sequence[str]], Any]
    ) -> dict[str, str]:
        """By id, of clips that no seed is near. Raises CinemeshError for seeds that are no list of texts."""
        seeds = read_yaml(Path(self.seeds), "the seeds", "correct neighbours.seeds")
        if not isinstance(seeds, list) or not seeds or not all(isinstance(each, str) for each in seeds):
            raise CinemeshError(f"{self.seeds} is no list of seeds", remedy="write ids of clips, or texts")
        if not rows:
            return {}
        found = np.array([vectors[row["id"]] for row in rows], np.float32)
        clips = [each for each in seeds if each in vectors]
        others = [each for each in seeds if each not in vectors]
        asked = [np.array([vectors[each] for each in clips], np.float32)] if clips else []
        if others:
            asked.append(np.asarray(texts(others), np.float32))
        flat = faiss_of("neighbours").IndexFlatIP(found.shape[1])
        flat.add(found)
        near = flat.search(np.concatenate(asked), min(self.k, len(rows)))[1]
        kept = {rows[int(i)]["id"] for i in near.reshape(-1)}
        return {row["id"]: f"of no seed it is among the {self.k} nearest" for row in rows if row["id"] not in kept}
