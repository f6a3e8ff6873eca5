"""How many samples a step has, and since when: a run that lost ranks may go on with fewer (torch-free).

The samples of a step are a function of the seed, the step and this history, which every checkpoint holds: each bucket's
stream is taken up where it was left, whatever a step takes of it, so that a sample that a smaller step leaves is the
next step's, and an epoch has every sample once. A run that was rolled back passes over the samples that it was rolled
back for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Batches = tuple[int, ...]  # samples of a step of every bucket
BATCHES = "batches"  # of a checkpoint's note: since which step, and how many
PASSED_OVER = "passed_over"  # of a note: before which step, and how many samples of every bucket


@dataclass(frozen=True)
class BatchHistory:
    """``eras``: a step, and the samples that steps of each bucket have from it on; the first is step 0.

    ``passed``: a step, and how many samples of each bucket's stream are passed over before it, in order of steps.
    """

    eras: tuple[tuple[int, Batches], ...]
    passed: tuple[tuple[int, Batches], ...] = ()

    @classmethod
    def always(cls, batches: Batches) -> BatchHistory:
        """Of a run whose steps all have these."""
        return cls(((0, batches),))

    @classmethod
    def of(cls, note: dict[str, Any], batches: Batches) -> BatchHistory:
        """That of a checkpoint's note; one that does not say was always of these ``batches``."""
        return cls(_read(note.get(BATCHES, [[0, batches]])), _read(note.get(PASSED_OVER, [])))

    def noted(self) -> dict[str, list[list[Any]]]:
        """As a note holds it."""
        parts = {BATCHES: self.eras, PASSED_OVER: self.passed}
        return {name: [[step, list(sizes)] for step, sizes in part] for name, part in parts.items()}

    def going_on(self, step: int, batches: Batches) -> BatchHistory:
        """Steps from this one on have these batches."""
        before = tuple(era for era in self.eras if era[0] < step or step == 0)
        if before and before[-1][1] == batches:
            return BatchHistory(before, self.passed)
        return BatchHistory((*(before if step else ()), (step, batches)), self.passed)

    def rolled_back(self, to: int, bucket_of: Sequence[int], versions: Sequence[int] = ()) -> BatchHistory:
        """After a run that had come to the end of these steps went back to step ``to``: their samples are passed over.

        Steps from there on take up the streams where the last of them left them. ``versions``: steps at which the
        streams begin anew; what was taken of each is passed over in it.
        """
        cuts = [to, *(step for step in versions if to < step < len(bucket_of)), len(bucket_of)]
        taken = [self.taken(bucket_of[:cut]) for cut in cuts]
        new = [
            (cut, tuple(b - a for a, b in zip(before, after, strict=True)))
            for cut, before, after in zip(cuts[:-1], taken[:-1], taken[1:], strict=True)
        ]
        eras = tuple(era for era in self.eras if era[0] <= to)
        return BatchHistory(eras, (*(one for one in self.passed if one[0] < to), *new))

    def at(self, step: int) -> Batches:
        """Samples of a step of each bucket."""
        return next(sizes for first, sizes in reversed(self.eras) if first <= step)

    def places(self, bucket_of: Sequence[int]) -> list[int]:
        """Of every step, whose buckets these are, where its samples begin in the stream of its bucket."""
        taken = [0] * len(self.eras[0][1])
        begins: list[int] = []
        for passed, sizes, buckets in self._parts(bucket_of):
            taken = [a + b for a, b in zip(taken, passed, strict=True)]
            for bucket in buckets:
                begins.append(taken[bucket])
                taken[bucket] += sizes[bucket]
        return begins

    def taken(self, bucket_of: Sequence[int]) -> list[int]:
        """Of each bucket's stream, how many samples these steps took or passed over."""
        taken = [0] * len(self.eras[0][1])
        for passed, sizes, buckets in self._parts(bucket_of):
            for bucket, size in enumerate(sizes):
                taken[bucket] += passed[bucket] + buckets.count(bucket) * size
        return taken

    def _parts(self, bucket_of: Sequence[int]) -> Iterator[tuple[Batches, Batches, Sequence[int]]]:
        """Steps of one size that follow upon another: samples passed over before them, sizes, their buckets."""
        end, passed, none = len(bucket_of), dict(self.passed), (0,) * len(self.eras[0][1])
        begins = sorted({step for step, _ in (*self.eras, *self.passed) if step < end})
        for first, last in zip(begins, [*begins[1:], end], strict=False):
            yield passed.get(first, none), self.at(first), bucket_of[first:last]


def _read(written: Sequence[Any]) -> tuple[tuple[int, Batches], ...]:
    return tuple((int(step), tuple(map(int, sizes))) for step, sizes in written)


def batches_told(batches: Batches, asked: Batches) -> str:
    """How many samples a step has, where a recipe asks for so many."""
    many, of = (" + ".join(f"{size:,}" for size in dict.fromkeys(sizes)) for sizes in (batches, asked))
    return f"{many} samples" if batches == asked else f"{many} samples in place of the recipe's {of}"
