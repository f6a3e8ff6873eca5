"""A version of the cache, read: windows of captioned scenes, in one shape or several (buckets).

Latents and text embeddings are made once (see ``building``; the paper, too, trains on cached latents) and kept in tars
that an index lists. A sample is a run of bytes of one of them; its crc32 stands in the index: what was not read as it
was written is an error. Samples of a block of neighbours are read together.

    C, T, H, W latent dims   L text tokens of an encoder   W_e its width   b samples of a data rank
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self, overload

import torch
from torch import Tensor

from ...documents import parse_json
from ...errors import CinemeshError
from ...kernels.philox import uniform
from ...model.inputs import IDS, LATENTS, MASK, PLACES, text_input
from .held import Block, HeldBlocks, IndexRow, RawBytes
from .index import CAPTION_ROWS, Index
from .storage import Storage
from .version import SPLITS, BucketRows, Version

LATENT = "latent"  # the tensor of a window's member; of a caption's: these two, and the encoder's name
TEXT, TEXT_MASK = "text.", "mask."
WORDING_PURPOSE = 10  # Philox purpose of which caption of several; beside those of kernels.philox and data.order
MOST_CAPTION_BYTES = 2**22  # of captions that are read with their block of latents; else each when it is drawn
DTYPES = {"F32": torch.float32, "U8": torch.uint8, "BOOL": torch.bool}  # of safetensors


@dataclass(frozen=True)
class Sample:
    """One window; ``text`` and ``mask`` by encoder name."""

    id: int
    scene: str
    first_frame: int  # in the video file
    caption: str  # as it was encoded, its rate before it
    latent: Tensor  # float32 [C, T, H, W]; uint8, of windows that are kept as they are
    text: dict[str, Tensor]  # float32 [L, W_e]
    mask: dict[str, Tensor]  # bool [L], True = valid
    frame_rate: Fraction  # frames/s at which it plays
    conditions: dict[str, Tensor] = field(default_factory=dict)  # latents that it is shown, by input name


@dataclass(frozen=True)
class CaptionDraw:
    """Of which of its captions each sample of a step takes: a function of the seed, the step, its id and its place."""

    seed: int
    step: int
    first_place: int  # of the samples, in the step's global batch

    def wording(self, sample_id: int, number: int, weights: Sequence[float]) -> int:
        """Of sample ``number`` of those at hand."""
        at = torch.tensor([self.step, sample_id, 0, self.first_place + number])
        (drawn,) = uniform(self.seed, WORDING_PURPOSE, at[:1], at[1:2], at[2:3], at[3:]).tolist()
        ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        return int(torch.searchsorted(ends[:-1] / ends[-1], drawn, right=True))


@dataclass(frozen=True)
class Files:
    """What all samples of a version share."""

    storage: Storage
    version: Version
    captions: Index
    held: HeldBlocks

    def caption(self, block: Block, row: IndexRow, number: int) -> tuple[IndexRow, RawBytes]:
        """IndexRow and bytes of a sample's caption."""
        place = row["caption"] + number
        if (found := block.others.get(place)) is not None:
            return found, block.of(found)
        (found,) = self.captions.rows(place, 1)
        alone = Block(self.storage, self.version.shards, [found])
        return found, alone.of(found)

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
    ) -> None:  # fmt: skip
        self._files, self._bucket, self._split, self._block, self._draw = files, bucket, split, block, draw
        self._index = index or Index(files.storage, bucket.of(split))
        self._picked = range(len(self._index)) if picked is None else picked

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
        number = range(len(self))[index]
        position = self._picked[number]
        first = position // self._block * self._block
        count = min(self._block, len(self._index) - first)
        if self._block > 1:
            key = self._bucket.bucket, self._split, first, id(self._files.version)
            block = self._files.held.get(key, lambda: self._files.block(self._index, first, count))
        else:
            block = self._files.block(self._index, first, count)
        return self._sample(block, block.rows[position - first], number)

    def _wording(self, row: IndexRow, number: int, told: Sequence[IndexRow | None] = (None,)) -> int:
        """Which of its captions sample ``number`` has; ``told``: rows of these, where they are at hand."""
        if row["captions"] == 1 or self._draw is None:
            return 0
        rows = [r for r in told if r] if all(told) else self._files.captions.rows(row["caption"], row["captions"])
        return self._draw.wording(row["id"], number, [r["weight"] for r in rows])

    def text(self, number: int) -> str:
        """The caption that a sample has; no latent is read."""
        (row,) = self._index.rows(self._picked[number], 1)
        return self._files.captions.rows(row["caption"] + self._wording(row, number), 1)[0]["text"]

    def _sample(self, block: Block, row: IndexRow, number: int) -> Sample:
        files = self._files
        told = [block.others.get(row["caption"] + i) for i in range(row["captions"])]
        caption, encoded = files.caption(block, row, self._wording(row, number, told))
        texts = member_tensors(encoded)
        latents = dict(member_tensors(block.of(row)))
        names = [encoder.name for encoder in files.version.encoders]
        return Sample(
            row["id"],
            row["clip"],
            row["first_frame"],
            caption["text"],
            latents.pop(LATENT),
            {name: texts[TEXT + name] for name in names},
            {name: texts[TEXT_MASK + name] for name in names},
            Fraction(row["fps_num"], row["fps_den"]),
            latents,
        )

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
        """The samples at ``indices``, in that order, their captions as ``draw`` draws them; nothing is read yet."""
        picked = [self._picked[index] for index in indices]
        options: dict[str, Any] = {"index": self._index, "block": self._block, "draw": draw or self._draw}
        return Samples(self._files, self._bucket, self._split, picked, **options)

    def in_blocks(self, block: int) -> Samples:
        """The same, read ``block`` neighbours at once."""
        return Samples(self._files, self._bucket, self._split, self._picked, index=self._index, block=block)


_layouts: dict[bytes, list[tuple[str, torch.dtype, list[int], int, int]]] = {}  # of headers that were read: few differ


def member_tensors(data: RawBytes) -> dict[str, Tensor]:
    """Of a member's bytes, without a copy. What safetensors does, whose reader takes bytes alone and copies them."""
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = data[8:start].tobytes()
    if (layout := _layouts.get(header)) is None:
        told = {
            name: at
            for name, at in parse_json(header.decode(), "the header of a member", "see `cinemesh data check`").items()
            if name != "__metadata__"
        }
        layout = [(name, DTYPES[at["dtype"]], at["shape"], *at["data_offsets"]) for name, at in told.items()]
        _layouts[header] = layout
    whole = torch.from_numpy(data)[start:]
    return {name: whole[a:b].view(dtype).view(shape) for name, dtype, shape, a, b in layout}


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
    mine = [samples[index] for index in range(dp_rank * share, (dp_rank + 1) * share)]
    names = list(mine[0].text)
    told = {text_input(name): torch.stack([sample.text[name] for sample in mine], 1) for name in names}
    if names:
        told[MASK] = torch.stack([torch.cat([sample.mask[name] for name in names]) for sample in mine])
    return {
        IDS: torch.tensor([sample.id for sample in mine]),
        PLACES: first_place + dp_rank * share + torch.arange(share),
        LATENTS: torch.stack([sample.latent for sample in mine]),
        **told,
        **{name: torch.stack([sample.conditions[name] for sample in mine]) for name in mine[0].conditions},
    }


def assert_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CinemeshError(
            f"{what} holds {bad} values of {values.numel()} that are NaN or infinite",
            remedy="check the clip and the encoder",
        )
