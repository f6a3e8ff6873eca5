"""A version of the cache, read: windows of captioned scenes, in one shape or several (buckets).

Latents and text embeddings are made once (see ``building``; the paper, too, trains on cached latents) and kept in tars
that an index lists. A sample is a run of bytes of one of them; its crc32 stands in the index: what was not read as it
was written is an error. Samples of a block of neighbours are read together.

    C, T, H, W latent dims   L text tokens of an encoder   W_e its width   b samples of a data rank
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from ...errors import CinemeshError
from ...kernels.philox import uniform
from ...model.inputs import IDS, LATENTS, MASK, PLACES, text_input
from .held import Array, Block, HeldBlocks, IndexRow
from .index import CAPTION_ROWS, Index
from .storage import Storage
from .version import SPLITS, BucketRows, Version

LATENT = "latent"  # the tensor of a window's member; of a caption's: these two, and the encoder's name
TEXT, TEXT_MASK = "text.", "mask."
WORDING_PURPOSE = 10  # Philox purpose of which caption of several; beside those of kernels.philox and data.order
MOST_CAPTION_BYTES = 2**22  # of captions that are read with their block of latents; else each when it is drawn
AT_ONCE = 64  # samples that are read together where many are: what they draw is drawn at once


@dataclass(frozen=True, slots=True)
class Sample:
    """One window: its rows in the indices, and the arrays of its members, which share their block's memory.

    Tensors are made of them when they are asked for: a batch is stacked from arrays, in a tenth of the time.
    """

    row: IndexRow
    caption_row: IndexRow
    latents: dict[str, Array]  # LATENT: float32 [C, T, H, W], or uint8; and latents that it is shown, by input name
    texts: dict[str, tuple[Array, Array]]  # by encoder name: float32 [L, W_e], and bool [L], True = valid

    @property
    def id(self) -> int:
        return self.row["id"]

    @property
    def scene(self) -> str:
        return self.row["clip"]

    @property
    def first_frame(self) -> int:
        """In the video file."""
        return self.row["first_frame"]

    @property
    def frame_rate(self) -> Fraction:
        """Frames/s at which it plays."""
        return Fraction(self.row["fps_num"], self.row["fps_den"])

    @property
    def caption(self) -> str:
        """As it was encoded, its rate before it."""
        return self.caption_row["text"]

    @property
    def latent(self) -> Tensor:
        """float32 [C, T, H, W]; uint8, of windows that are kept as they are."""
        return torch.from_numpy(self.latents[LATENT])

    @property
    def text(self) -> dict[str, Tensor]:
        """By encoder name, float32 [L, W_e]."""
        return {name: torch.from_numpy(text) for name, (text, _) in self.texts.items()}

    @property
    def mask(self) -> dict[str, Tensor]:
        """By encoder name, bool [L], True = valid."""
        return {name: torch.from_numpy(mask) for name, (_, mask) in self.texts.items()}


@dataclass(frozen=True)
class CaptionDraw:
    """Of which of its captions each sample of a step takes: a function of the seed, the step, its id and its place."""

    seed: int
    step: int
    first_place: int  # of the samples, in the step's global batch

    def wordings(self, ids: Sequence[int], numbers: Sequence[int], weights: Sequence[Sequence[float]]) -> list[int]:
        """Of samples of these ids, ``numbers`` of those at hand, among captions of these weights."""
        at = torch.tensor(numbers) + self.first_place
        step, zero = torch.full_like(at, self.step), torch.zeros_like(at)
        drawn = uniform(self.seed, WORDING_PURPOSE, step, torch.tensor(ids), zero, at).tolist()
        ends = [list(accumulate(map(float, of))) for of in weights]
        return [bisect_right([e / of[-1] for e in of[:-1]], one) for one, of in zip(drawn, ends, strict=True)]


@dataclass(frozen=True)
class Files:
    """What all samples of a version share."""

    storage: Storage
    version: Version
    captions: Index
    held: HeldBlocks

    def caption(self, block: Block, row: IndexRow, number: int) -> tuple[IndexRow, dict[str, Array]]:
        """Row and arrays of a sample's caption."""
        place = row["caption"] + number
        if (found := block.others.get(place)) is not None:
            return found, block.arrays(found)
        (found,) = self.captions.rows(place, 1)
        return found, Block(self.storage, self.version.shards, [found]).arrays(found)

    def captions_of(self, row: IndexRow, block: Block | None) -> list[IndexRow]:
        """Rows of all captions of a sample, from its block where they are there."""
        places = range(row["caption"], row["caption"] + row["captions"])
        if block is not None and all(place in block.others for place in places):
            return [block.others[place] for place in places]
        return self.captions.rows(row["caption"], row["captions"])

    def block(self, index: Index, first: int, count: int) -> Block:
        """Read rows of latents, and their captions where those are few."""
        rows = index.rows(first, count)
        places = sorted({place for row in rows for place in range(row["caption"], row["caption"] + row["captions"])})
        others: list[IndexRow] = []
        if count > 1 and places[-1] - places[0] < 2 * len(places):
            told = self.captions.rows(places[0], places[-1] - places[0] + 1)
            others = [row | {"place": number} for number, row in enumerate(told, places[0])]
            if sum(row["bytes"] for row in others) > MOST_CAPTION_BYTES:
                others = []
        return Block(self.storage, self.version.shards, rows, others)


class Samples(Sequence[Sample]):
    """Samples of one bucket and split, each read when it is asked for, with the block of ``block`` rows around it."""

    def __init__(
        self, files: Files, bucket: BucketRows, split: str, picked: Sequence[int] | None = None, *,
        index: Index | None = None, block: int = 1, draw: CaptionDraw | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._files, self._bucket, self._split, self._block, self._draw = files, bucket, split, block, draw
        self._index = index or Index(files.storage, bucket.of(split))
        self._picked = range(len(self._index)) if picked is None else picked
        # Of a split that memory cannot hold, a block goes when it was taken: an epoch takes a row once (data/order.py).
        self._once = len(self._index) * bucket.latent_bytes > files.held.most_bytes
        self._numbers = range(len(self._picked)) if numbers is None else numbers  # of those that ``draw`` was given for

    def __len__(self) -> int:
        return len(self._picked)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        """A sample, or a slice that reads nothing yet. Raises CinemeshError for damage, with file and offset."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._read([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Sample]:
        """In order; AT_ONCE are read together."""
        for first in range(0, len(self), AT_ONCE):
            yield from self._read(range(first, min(first + AT_ONCE, len(self))))

    def text(self, number: int) -> str:
        """The caption that a sample has; no latent is read."""
        (row,) = self._index.rows(self._picked[number], 1)
        (wording,) = self._wordings([number], [row], [None])
        return self._files.captions.rows(row["caption"] + wording, 1)[0]["text"]

    def _read(self, numbers: Sequence[int]) -> list[Sample]:
        files, encoders = self._files, [encoder.name for encoder in self._files.version.encoders]
        blocks, rows = zip(*(self._found(self._picked[number]) for number in numbers), strict=True)
        made: list[Sample] = []
        for block, row, wording in zip(blocks, rows, self._wordings(numbers, rows, blocks), strict=True):
            caption_row, texts = files.caption(block, row, wording)
            told = {name: (texts[TEXT + name], texts[TEXT_MASK + name]) for name in encoders}
            made.append(Sample(row, caption_row, block.arrays(row), told))
        return made

    def _found(self, position: int) -> tuple[Block, IndexRow]:
        """A row of the index, and the block that it is read with."""
        first = position // self._block * self._block
        key, count, read = self._wanted(first)
        block = self._files.held.get(key, read, count if self._once else 0) if self._block > 1 else read()
        return block, block.rows[position - first]

    def _wanted(self, first: int) -> tuple[Any, int, Callable[[], Block]]:
        """Of the block that begins with a row: its key, its rows, and how it is read."""
        count = min(self._block, len(self._index) - first)
        key = self._bucket.bucket, self._split, first, id(self._files.version)
        return key, count, lambda: self._files.block(self._index, first, count)

    def _wordings(self, numbers: Sequence[int], rows: Sequence[IndexRow], blocks: Sequence[Block | None]) -> list[int]:
        """Which of its captions each of these samples has."""
        found = [0] * len(rows)
        several = [at for at, row in enumerate(rows) if row["captions"] > 1]
        if self._draw is not None and several:
            weights = [[told["weight"] for told in self._files.captions_of(rows[at], blocks[at])] for at in several]
            places = [self._numbers[numbers[at]] for at in several]
            drawn = self._draw.wordings([rows[at]["id"] for at in several], places, weights)
            for at, wording in zip(several, drawn, strict=True):
                found[at] = wording
        return found

    @property
    def latent_bytes(self) -> int:
        """Of every sample."""
        return self._bucket.latent_bytes

    def ids(self, indices: Sequence[int]) -> list[int]:
        """Of these samples; no latent is read."""
        return [self._index.rows(self._picked[index], 1)[0]["id"] for index in indices]

    @property
    def scenes(self) -> list[str]:
        """The scene of every sample."""
        return [row["clip"] for row in self._rows("clip")]

    @property
    def frame_rates(self) -> list[Fraction]:
        """Frames/s of every sample."""
        return [Fraction(row["fps_num"], row["fps_den"]) for row in self._rows("fps_num", "fps_den")]

    @property
    def captions(self) -> dict[str, str]:
        """The first caption of every scene, as it was encoded."""
        first = {row["clip"]: row["caption"] for row in self._rows("clip", "caption")}
        return {clip: self._files.captions.rows(place, 1)[0]["text"] for clip, place in first.items()}

    def _rows(self, *columns: str) -> Iterator[IndexRow]:
        """Of every sample, these columns."""
        rows = [row for table in self._index.columns(*columns) for row in table.to_pylist()]
        return (rows[position] for position in self._picked)

    def select(self, indices: Sequence[int], draw: CaptionDraw | None = None) -> Samples:
        """The samples at ``indices``, in that order, their captions as ``draw`` draws them; nothing is read yet.

        Without ``draw`` each keeps the caption that it has.
        """
        picked = [self._picked[index] for index in indices]
        numbers = None if draw else [self._numbers[index] for index in indices]
        options: dict[str, Any] = {"index": self._index, "block": self._block, "draw": draw or self._draw}
        return Samples(self._files, self._bucket, self._split, picked, numbers=numbers, **options)

    def read_ahead(self) -> None:
        """Have their blocks held, for those who ask for these samples later. Raises CinemeshError as reading does."""
        if self._block > 1:
            for first in dict.fromkeys(position // self._block * self._block for position in self._picked):
                key, _, read = self._wanted(first)
                self._files.held.ahead(key, read)

    def in_blocks(self, block: int) -> Samples:
        """The same, read ``block`` neighbours at once."""
        return Samples(
            self._files, self._bucket, self._split, self._picked,
            index=self._index, block=block, draw=self._draw, numbers=self._numbers,
        )  # fmt: skip


@dataclass(frozen=True)
class Windows:
    """All samples of one bucket."""

    bucket: str  # as str(Bucket)
    train: Samples
    validation: Samples


class Cache:
    """An open version: the samples of each bucket, in the recipe's order."""

    def __init__(self, storage: Storage, version: Version, held: HeldBlocks | None = None) -> None:
        self.version, self.name, self.storage = version, version.name, storage
        files = Files(storage, version, Index(storage, version.captions, CAPTION_ROWS), held or HeldBlocks())
        self.buckets = [Windows(b.bucket, *(Samples(files, b, split) for split in SPLITS)) for b in version.buckets]
        self._captions = files.captions

    def first_captions(self, most: int) -> tuple[dict[str, str], int]:
        """The first ``most`` captions, by what they are of, and how many there are."""
        rows = self._captions.rows(0, min(most, len(self._captions)))
        return {f"number {n} of scene {row['clip']}": row["text"] for n, row in enumerate(rows)}, len(self._captions)

    @property
    def frame_rate(self) -> Fraction:
        """Frames/s of most training windows: what a model knows best to move at."""
        rates = Counter[str]()
        for bucket in self.version.buckets:
            rates.update(bucket.rates)
        return Fraction(max(rates, key=lambda rate: rates[rate]))

    @classmethod
    def open(cls, place: str, name: str, held: HeldBlocks | None = None) -> Self:
        """Version ``name`` of the cache in a folder, or at a URL. Raises CinemeshError when there is none."""
        storage = Storage(place)
        return cls(storage, Version.read(storage, name), held)


def collate(samples: Sequence[Sample], dp_rank: int, dp_size: int, first_place: int = 0) -> dict[str, Tensor]:
    """Data rank ``dp_rank``'s contiguous share of a micro-batch, by input name; reads only that share.

    ``ids`` and ``places`` int64 [b], ``latents`` float32 [b, C, T, H, W], text of each encoder float32 [L, b, W_e],
    ``mask`` bool [b, sum of L], encoders in order; of a cache without embeddings, no text; latents that samples are
    shown, as ``latents``. ``first_place``: the micro-batch's, in the step's global batch.
    Raises CinemeshError when the samples do not divide by ``dp_size``.
    """
    if not samples or len(samples) % dp_size:
        raise CinemeshError(
            f"micro-batch({len(samples)}) % data ranks({dp_size}) = {len(samples) % dp_size}",
            remedy="every data rank needs as many samples, at least one: change the global batch",
        )
    share = len(samples) // dp_size
    mine = list(samples[dp_rank * share : (dp_rank + 1) * share])
    told = {text_input(name): _stacked([sample.texts[name][0] for sample in mine], 1) for name in mine[0].texts}
    if told:
        told[MASK] = _stacked([np.concatenate([mask for _, mask in sample.texts.values()]) for sample in mine], 0)
    return {
        IDS: torch.tensor([sample.id for sample in mine]),
        PLACES: first_place + dp_rank * share + torch.arange(share),
        LATENTS: _stacked([sample.latents[LATENT] for sample in mine], 0),
        **told,
        **{name: _stacked([sample.latents[name] for sample in mine], 0) for name in mine[0].latents if name != LATENT},
    }


def _stacked(arrays: Sequence[Array], axis: int) -> Tensor:
    return torch.from_numpy(np.stack(arrays, axis))


def assert_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CinemeshError(
            f"{what} holds {bad} values of {values.numel()} that are NaN or infinite",
            remedy="check the clip and the encoder",
        )
