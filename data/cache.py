"""Training data: windows of captioned scenes, in one shape or several (buckets), encoded once into a cache.

Latents and text embeddings are made once (the paper, too, trains
on cached latents) and kept in one safetensors file whose header says what they were made of; when
any of it changes, the file is made again. Every window and embedding has a digest in the header, and the header has its
own: what was not read as it was written is an error.

    C, T, H, W latent dims   L text tokens of an encoder   W_e its width   b samples of a data rank
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Self, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..documents import parse_json
from ..errors import CinemeshError
from ..files import atomic_file
from ..model.codec import LatentCodec
from ..model.inputs import IDS, LATENTS, MASK, PLACES, text_input
from .buckets import Bucket, latents_of
from .clips import Scene, find_clips, frame_rate, read_scenes
from .encoding import Encoding
from .settings import DataSettings
from .text import file_digest

# Raise it when the file layout, how frames are scaled and cropped, or what is drawn by a sample's id changes: from 3 on
# by its place in the batch too; from 4 on rows have digests, from 5 on videos their frame rates.
FORMAT = 5
CACHE_FILE = "clips.safetensors"
SPLITS = ("train", "validation")

Rows = dict[str, dict[str, list[tuple[int, int]]]]
# Bucket, split, scene, first frame from the scene's start, and frames uint8 [T, H, W, 3].
Window = tuple[Bucket, str, Scene, int, Tensor]


@dataclass(frozen=True)
class Sample:
    """One window; ``text`` and ``mask`` by encoder name. Ids run on from train to validation and bucket to bucket."""

    id: int
    scene: str
    first_frame: int  # in the video file
    caption: str
    latent: Tensor  # float32 [C, T, H, W]
    text: dict[str, Tensor]  # float32 [L, W_e]
    mask: dict[str, Tensor]  # bool [L], True = valid
    frame_rate: Fraction  # frames/s of its video


def build_cache(settings: DataSettings, encoding: Encoding, cache_dir: Path, progress: bool = True) -> Path:
    """Encode every window and caption into ``cache_dir``, unless its cache is of these already.

    Returns the cache file, which appears whole or not at all. Raises CinemeshError for bad clips, captions or buckets,
    latents or embeddings that are not finite, a full disk, and an existing cache that cannot be read.
    """
    latents_of(settings.shapes, encoding.codec)
    scenes, clips = settings.scenes(), find_clips(settings.clips)
    recipe = _recipe(settings, encoding, clips, scenes)
    path = cache_dir / CACHE_FILE
    if path.exists() and _header(path)["recipe"] == recipe:
        return path
    for cut in encoding.cuts({f"of scene {scene.name}": scene.caption for scene in scenes}):
        print(f"{cut}: raise its tokens in data.encoders, or shorten them in {settings.captions}", file=sys.stderr)
    embeddings = _embeddings(encoding, scenes)
    latents, rows = _latents(settings, encoding.codec, scenes, _cut(settings, clips, scenes, progress))
    codec = asdict(encoding.settings)  # for whoever reads the header; the fingerprint in ``recipe`` is what counts
    tensors = embeddings | latents
    digests = {name: [_digest(row) for row in values] for name, values in tensors.items()}
    rates = {file: frame_rate(clips[file]) for file in recipe["sources"]}
    header = {"recipe": recipe, "codec": codec, "rows": rows, "frame_rates": rates, "digests": digests}
    text = json.dumps(header, default=str)
    _write(path, tensors, {"cinemesh": text, "digest": _sha256(text.encode())})
    return path


def _recipe(
    settings: DataSettings, encoding: Encoding, clips: Mapping[str, Path], scenes: Sequence[Scene]
) -> dict[str, Any]:
    """All that a cache is made of: where any of it differs, it is another cache."""
    used = {scene.file for scene in scenes}
    return {
        "format": FORMAT,
        "codec": encoding.codec.fingerprint,
        "encoders": [
            {"name": e.name, "width": e.width, "tokens": e.tokens, "fingerprint": e.fingerprint}
            for e in encoding.encoders
        ],
        "sources": {file: file_digest(path) for file, path in clips.items() if file in used},
        "scenes": [asdict(scene) for scene in scenes],
        "buckets": [str(bucket) for bucket in settings.shapes],
        "stride": settings.stride,
        "validation_share": settings.validation_share,
    }


def _embeddings(encoding: Encoding, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Text and mask of every scene's caption, by encoder."""
    tensors: dict[str, Tensor] = {}
    for encoder in encoding.encoders:
        pairs = [encoder.encode(scene.caption) for scene in scenes]
        for scene, (text, _) in zip(scenes, pairs, strict=True):
            _assert_finite(text, f"the {encoder.name} embedding of the caption of scene {scene.name}")
        tensors[f"text.{encoder.name}"] = torch.stack([text for text, _ in pairs])
        tensors[f"mask.{encoder.name}"] = torch.stack([mask for _, mask in pairs])
    return tensors


def _latents(
    settings: DataSettings, codec: LatentCodec, scenes: Sequence[Scene], cut: Iterable[Window]
) -> tuple[dict[str, Tensor], Rows]:
    """By bucket and split: the latents of all windows, and of each its scene and first frame in the video."""
    index = {scene.name: number for number, scene in enumerate(scenes)}
    rows: Rows = {str(bucket): {split: [] for split in SPLITS} for bucket in settings.shapes}
    latents: dict[str, list[Tensor]] = {_tensor(bucket, split): [] for bucket in rows for split in SPLITS}
    for bucket, split, scene, first, frames in cut:
        latent, at = codec.encode(frames), scene.first_frame + first
        _assert_finite(latent, f"the latent of scene {scene.name} at frame {at}")
        latents[_tensor(str(bucket), split)].append(latent)
        rows[str(bucket)][split].append((index[scene.name], at))
    tensors: dict[str, Tensor] = {}
    for bucket in rows:
        shape = latents[_tensor(bucket, "train")][0].shape
        for name in (_tensor(bucket, split) for split in SPLITS):
            tensors[name] = torch.stack(latents[name]) if latents[name] else torch.empty(0, *shape)
    return tensors, rows


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    try:
        with atomic_file(path) as part:
            save_file(tensors, part, metadata=header)
    except (CinemeshError, SafetensorError) as error:
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        raise CinemeshError(
            f"cannot write the latent cache of {size_bytes / 1e6:.1f} MB to {path}: {error.__cause__ or error}",
            remedy="free some space or name another directory",
        ) from error


def _cut(
    settings: DataSettings, clips: Mapping[str, Path], scenes: Sequence[Scene], progress: bool
) -> Iterator[Window]:
    """Every window, as it is decoded."""
    shapes = settings.shapes
    sizes = list(dict.fromkeys((bucket.height, bucket.width) for bucket in shapes))
    bar = tqdm(total=len(sizes) * len(scenes), desc="encoding scenes", unit="scene", disable=None if progress else True)
    with bar:
        for height, width in sizes:
            for scene, frames in read_scenes(clips, scenes, height, width):
                for bucket, starts in settings.windows(scene):
                    if (bucket.height, bucket.width) == (height, width):
                        for split, firsts in zip(SPLITS, starts, strict=True):
                            for first in firsts:
                                yield bucket, split, scene, first, frames[first : first + bucket.frames]
                bar.update()


def _tensor(bucket: str, split: str) -> str:
    return f"latent.{bucket}.{split}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _digest(row: Tensor) -> str:
    """Of a window's latent, or of a caption's embedding or mask: its values and what they are."""
    return _sha256(f"{row.dtype} {tuple(row.shape)} ".encode() + row.contiguous().numpy().tobytes())


def _assert_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CinemeshError(
            f"{what} holds {bad} values of {values.numel()} that are NaN or infinite",
            remedy="check the clip and the encoder, delete the latent cache and build it again",
        )


def _header(path: Path) -> dict[str, Any]:
    """The recipe and rows of a cache file. Raises CinemeshError when it cannot be read whole."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        text = metadata["cinemesh"]
        if "digest" in metadata and metadata["digest"] != _sha256(text.encode()):  # older ones have none: made again
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
        self._file, self._header, self._tensor, self._picked = file, header, _tensor(bucket, split), picked
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
        scene = self._header["recipe"]["scenes"][number]
        sample_id = self.first_id + position
        latent = self._read(self._tensor, position, f"sample {sample_id} (scene {scene['name']}, frame {first_frame})")
        names = [encoder["name"] for encoder in self._header["recipe"]["encoders"]]
        text = {name: self._read(f"text.{name}", number, f"scene {scene['name']}") for name in names}
        mask = {name: self._read(f"mask.{name}", number, f"scene {scene['name']}") for name in names}
        rate = Fraction(self._header["frame_rates"][scene["file"]])
        return Sample(sample_id, scene["name"], first_frame, scene["caption"], latent, text, mask, rate)

    def _read(self, tensor: str, row: int, whose: str) -> Tensor:
        values = self._file.get_slice(tensor)[row]
        _assert_finite(values, whose if tensor == self._tensor else f"{tensor} of {whose}")
        if _digest(values) != self._header["digests"][tensor][row]:
            raise CinemeshError(
                f"{tensor} of {whose} is not what the latent cache was written with: its digest differs",
                remedy="delete the cache, which the next run builds again, and look to the disk",
            )
        return values

    @property
    def scenes(self) -> list[str]:
        """The scene of every sample."""
        return [scene["name"] for scene in self._scenes]

    @property
    def frame_rates(self) -> list[Fraction]:
        """Frames/s of every sample."""
        rates = {file: Fraction(rate) for file, rate in self._header["frame_rates"].items()}
        return [rates[scene["file"]] for scene in self._scenes]

    @property
    def _scenes(self) -> list[dict[str, Any]]:
        scenes = self._header["recipe"]["scenes"]
        return [scenes[self._rows[position][0]] for position in self._picked]

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
        """Frames/s of most training windows: what a model learns to move at, which is told no rate."""
        rates = Counter(rate for windows in self.buckets for rate in windows.train.frame_rates)
        return max(rates, key=lambda rate: rates[rate])

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the header. Raises CinemeshError when there is no cache or it is truncated."""
        header = _header(path)
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
