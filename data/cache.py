"""The latent cache, read: windows of captioned scenes, in one shape or several (buckets).

Latents and text embeddings are made once (see ``building``; the paper, too, trains on cached latents) and kept in one
safetensors file whose header says what they were made of; when any of it changes, the file is made again. Every window
and embedding has a digest in the header, and the header has its own: what was not read as it was written is an error.

    C, T, H, W latent dims   L text tokens of an encoder   W_e its width   b samples of a data rank
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Self, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..documents import parse_json
from ..errors import CinemeshError
from ..model.inputs import IDS, LATENTS, MASK, PLACES, text_input

CACHE_FILE = "clips.safetensors"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Sample:
    """One window; ``text`` and ``mask`` by encoder name. Ids run on from train to validation and bucket to bucket."""

    id: int
    scene: str
    first_frame: int  # in the video file
    caption: str  # as it was encoded, its rate before it
    latent: Tensor  # float32 [C, T, H, W]
    text: dict[str, Tensor]  # float32 [L, W_e]
    mask: dict[str, Tensor]  # bool [L], True = valid
    frame_rate: Fraction  # frames/s at which it plays


def tensor_name(bucket: str, split: str) -> str:
    return f"latent.{bucket}.{split}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def row_digest(row: Tensor) -> str:
    """Of a window's latent, or of a caption's embedding or mask: its values and what they are."""
    return sha256(f"{row.dtype} {tuple(row.shape)} ".encode() + row.contiguous().numpy().tobytes())


def assert_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CinemeshError(
            f"{what} holds {bad} values of {values.numel()} that are NaN or infinite",
            remedy="check the clip and the encoder, delete the latent cache and build it again",
        )


def read_header(path: Path) -> dict[str, Any]:
    """The recipe and rows of a cache file. Raises CinemeshError when it cannot be read whole."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        text = metadata["cinemesh"]
        if "digest" in metadata and metadata["digest"] != sha256(text.encode()):  # older ones have none: made again
            raise ValueError("its header is not as it was written")
    except FileNotFoundError as error:
        raise CinemeshError(f"there is no latent cache at {path}: build it first") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CinemeshError(
            f"the latent cache {path} is truncated or no cache ({error}): delete it",
            remedy="the next run builds it again",
        ) from error
    return parse_json(text, f"the header of the latent cache {path}", "delete it: the next run builds it again")


class Samples(Sequence[Sample]):
    """Samples of one bucket and split, each read from the file when it is asked for."""

    def __init__(
        self, file: Any, header: dict[str, Any], bucket: str, split: str, first_id: int, picked: Sequence[int]
    ) -> None:
        self._file, self._header, self._tensor, self._picked = file, header, tensor_name(bucket, split), picked
        self._rows: list[tuple[int, int]] = header["rows"][bucket][split]
        self._select = partial(Samples, file, header, bucket, split, first_id)
        self.first_id = first_id  # of the split, whatever is picked of it

    def __len__(self) -> int:
        return len(self._picked)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        """A sample, or a slice that reads nothing yet. Raises CinemeshError for a NaN and for damage, by name."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        position = self._picked[index]
        number, first_frame = self._rows[position]
        told = self._header["captions"][number]
        scene, sample_id = told["scene"], self.first_id + position
        latent = self._read(self._tensor, position, f"sample {sample_id} (scene {scene}, frame {first_frame})")
        names = [encoder["name"] for encoder in self._header["recipe"]["encoders"]]
        text = {name: self._read(f"text.{name}", number, f"scene {scene}") for name in names}
        mask = {name: self._read(f"mask.{name}", number, f"scene {scene}") for name in names}
        return Sample(sample_id, scene, first_frame, told["text"], latent, text, mask, Fraction(told["rate"]))

    def _read(self, tensor: str, row: int, whose: str) -> Tensor:
        values = self._file.get_slice(tensor)[row]
        assert_finite(values, whose if tensor == self._tensor else f"{tensor} of {whose}")
        if row_digest(values) != self._header["digests"][tensor][row]:
            raise CinemeshError(
                f"{tensor} of {whose} is not what the latent cache was written with: its digest differs",
                remedy="delete the cache, which the next run builds again, and look to the disk",
            )
        return values

    @property
    def latent_bytes(self) -> int:
        """Of every sample."""
        return 4 * math.prod(self._file.get_slice(self._tensor).get_shape()[1:])  # float32

    @property
    def scenes(self) -> list[str]:
        """The scene of every sample."""
        return [told["scene"] for told in self._captions]

    @property
    def frame_rates(self) -> list[Fraction]:
        """Frames/s of every sample."""
        return [Fraction(told["rate"]) for told in self._captions]

    @property
    def captions(self) -> dict[str, str]:
        """The caption of every scene, as it was encoded."""
        return {told["scene"]: told["text"] for told in self._captions}

    @property
    def _captions(self) -> list[dict[str, str]]:
        captions = self._header["captions"]
        return [captions[self._rows[position][0]] for position in self._picked]

    def select(self, indices: Sequence[int]) -> Samples:
        """The samples at ``indices``, in that order; nothing is read yet."""
        return self._select([self._picked[index] for index in indices])


@dataclass(frozen=True)
class Windows:
    """All samples of one bucket."""

    bucket: str  # as str(Bucket)
    train: Samples
    validation: Samples


class Cache:
    """An open cache file: the samples of each bucket, in the recipe's order."""

    def __init__(self, file: Any, header: dict[str, Any]) -> None:
        self.digest = sha256(json.dumps(header, default=str).encode())  # of all that it holds: of every row's too
        self.contents = sha256(json.dumps(header["recipe"], default=str).encode())  # of what it was made of
        self.buckets: list[Windows] = []
        first_id = 0
        for bucket, rows in header["rows"].items():
            splits: list[Samples] = []
            for split in SPLITS:
                splits.append(Samples(file, header, bucket, split, first_id, range(len(rows[split]))))
                first_id += len(rows[split])
            self.buckets.append(Windows(bucket, *splits))

    @property
    def frame_rate(self) -> Fraction:
        """Frames/s of most training windows: what a model knows best to move at."""
        rates = Counter(rate for windows in self.buckets for rate in windows.train.frame_rates)
        return max(rates, key=lambda rate: rates[rate])

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the header. Raises CinemeshError when there is no cache or it is truncated."""
        header = read_header(path)
        return cls(safe_open(path, framework="pt"), header)


def collate(samples: Sequence[Sample], dp_rank: int, dp_size: int, first_place: int = 0) -> dict[str, Tensor]:
    """Data rank ``dp_rank``'s contiguous share of a micro-batch, by input name; reads only that share.

    ``ids`` and ``places`` int64 [b], ``latents`` float32 [b, C, T, H, W], text of each encoder float32 [L, b, W_e],
    ``mask`` bool [b, sum of L], encoders in order. ``first_place``: the micro-batch's, in the step's global batch.
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
    return {
        IDS: torch.tensor([sample.id for sample in mine]),
        PLACES: first_place + dp_rank * share + torch.arange(share),
        LATENTS: torch.stack([sample.latent for sample in mine]),
        MASK: torch.stack([torch.cat([sample.mask[name] for name in names]) for sample in mine]),
        **{text_input(name): torch.stack([sample.text[name] for sample in mine], 1) for name in names},
    }
