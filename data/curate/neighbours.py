"""Neighbours of concepts and of hand-picked clips: how a set for fine-tuning grows (Movie Gen, 3.3).

Seeds are a YAML list of texts, and of clips as ``clip: ID``, which ``clips.parquet`` has. ``taxonomy.yaml`` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from ...documents import quoted, read_yaml
from ...errors import CinemeshError
from ...ranges import check_ranges, integers
from .copies import faiss_of
from .rows import ClipRow

TAXONOMY = Path(__file__).parent / "taxonomy.yaml"
FORM = "write texts, and clips as clip: ID"
Nearest = Annotated[int, integers(1, 10**6, "neighbours of a seed", "clips")]


@dataclass(frozen=True)
class Neighbours:
    """Each seed keeps the ``k`` clips that are most like it. ``seeds``: a file; null: the texts that ship."""

    seeds: str | None = None
    k: Nearest = 100

    needs: ClassVar[str] = "joint"

    def __post_init__(self) -> None:
        check_ranges(self, "neighbours.")

    def dropped(
        self, rows: Sequence[ClipRow], vectors: Mapping[str, Any], texts: Callable[[Sequence[str]], Any]
    ) -> dict[str, str]:
        """By id, of clips that no seed is near. Raises CinemeshError for what is no seed, or a clip that is gone."""
        if not rows:
            return {}
        path = TAXONOMY if self.seeds is None else Path(self.seeds)
        clips, others = read_seeds(path)
        if gone := [each for each in clips if each not in vectors]:
            raise CinemeshError(
                f"{path}: clip {quoted(gone[0])} is not among the {len(vectors)} that are left for neighbours",
                remedy="name clips that clips.parquet says are kept, or a text",
            )
        asked = [np.array([vectors[each] for each in clips], np.float32)] if clips else []
        if others:
            asked.append(np.asarray(texts(others), np.float32))
        found = np.array([vectors[row["id"]] for row in rows], np.float32)
        flat = faiss_of("neighbours").IndexFlatIP(found.shape[1])
        flat.add(found)
        near = flat.search(np.concatenate(asked), min(self.k, len(rows)))[1]
        kept = {rows[int(i)]["id"] for i in near.reshape(-1)}
        return {row["id"]: f"of no seed it is among the {self.k} nearest" for row in rows if row["id"] not in kept}


def read_seeds(path: Path) -> tuple[list[str], list[str]]:
    """Ids of clips, and texts. Raises CinemeshError."""
    listed = read_yaml(path, "the seeds", "correct neighbours.seeds")
    if not isinstance(listed, list) or not listed:
        raise CinemeshError(f"{path} is no list of seeds", remedy=FORM)
    clips: list[str] = []
    texts: list[str] = []
    for number, seed in enumerate(listed, 1):
        if isinstance(seed, str) and seed.strip():
            texts.append(seed)
        elif isinstance(seed, dict) and [*seed] == ["clip"] and isinstance(seed["clip"], str):
            clips.append(seed["clip"])
        else:
            raise CinemeshError(f"{path}: seed {number} is {quoted(seed)}", remedy=FORM)
    return clips, texts
