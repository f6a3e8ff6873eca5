"""How many samples a step has, and since when: a run that lost ranks may go on with fewer (torch-free).

The samples of a step are a function of the seed, the step and this history, which every checkpoint holds: each bucket's
stream is taken up where it was left, whatever a step takes of it, so that a sample that a smaller step leaves is the
next step's, and an epoch has every sample once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Batches = tuple[int, ...]  # samples of a step of every bucket
BATCHES = "batches"  # of a checkpoint's note: since which step, and how many


@dataclass(frozen=True)
class BatchHistory:
    """``eras``: a step, and the samples that steps of each bucket have from it on; the first is step 0."""

    eras: tuple[tuple[int, Batches], ...]

    @classmethod
    def always(cls, batches: Batches) -> BatchHistory:
        """Of a run whose steps all have these."""
        return cls(((0, batches),))

    @classmethod
    def of(cls, note: dict[str, Any], batches: Batches) -> BatchHistory:
        """That of a checkpoint's note; one that does not say was always of these ``batches``."""
        written = note.get(BATCHES, [[0, batches]])
        return cls(tuple((int(step), tuple(map(int, sizes))) for step, sizes in written))

    def noted(self) -> list[list[Any]]:
        """As a note holds it."""
        return [[step, list(sizes)] for step, sizes in self.eras]

    def going_on(self, step: int, batches: Batches) -> BatchHistory:
        """Steps from this one on have these batches."""
        before = tuple(era for era in self.eras if era[0] < step or step == 0)
        if before and before[-1][1] == batches:
            return BatchHistory(before)
        return BatchHistory((*(before if step else ()), (step, batches)))

    def at(self, step: int) -> Batches:
        """Samples of a step of each bucket."""
        return next(sizes for first, sizes in reversed(self.eras) if first <= step)

    def places(self, bucket_of: Sequence[int]) -> list[int]:
        """Of every step, whose buckets these are, where its samples begin in the stream of its bucket."""
        taken = [0] * len(self.eras[0][1])
        begins: list[int] = []
        for sizes, buckets in self._parts(bucket_of):
            for bucket in buckets:
                begins.append(taken[bucket])
                taken[bucket] += sizes[bucket]
        return begins

    def taken(self, bucket_of: Sequence[int]) -> list[int]:
        """Of each bucket's stream, how many samples these steps took."""
        taken = [0] * len(self.eras[0][1])
        for sizes, buckets in self._parts(bucket_of):
            for bucket, size in enumerate(sizes):
                taken[bucket] += buckets.count(bucket) * size
        return taken

    def _parts(self, bucket_of: Sequence[int]) -> Iterator[tuple[Batches, Sequence[int]]]:
        """The steps of each era."""
        ends = [first for first, _ in self.eras[1:]] + [len(bucket_of)]
        for (first, sizes), end in zip(self.eras, ends, strict=True):
            yield sizes, bucket_of[first:end]


def batches_told(batches: Batches, asked: Batches) -> str:
    """How many samples a step has, where a recipe asks for so many."""
    many, of = (" + ".join(f"{size:,}" for size in dict.fromkeys(sizes)) for sizes in (batches, asked))
    return f"{many} samples" if batches == asked else f"{many} samples in place of the recipe's {of}"
