"""Building the latent cache: every window of the captioned scenes, and every caption, encoded once.

A clip that is damaged or cannot be shown as it is meant is skipped, and written down in SKIPPED_FILE beside the cache;
more of them than ``data.bad_share`` end the job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import CinemeshError
from ..files import atomic_file
from .buckets import latents_of
from .cache import CACHE_FILE, SPLITS, assert_finite, read_header, row_digest, sha256, tensor_name
from .encoding import Encoding
from .scenes import Scene, find_clips
from .settings import Cut, DataSettings
from .stills import is_still, look_at, still_windows
from .text import file_digest, with_fps
from .video import BadClip, Survey, Window, look_through, read_windows

# Raise it when the file layout, how frames are picked, coloured, scaled and cropped, or what is drawn by a sample's id
# changes: from 3 on by its place in the batch too; from 4 on rows have digests; from 6 on frames lie on a time grid,
# upright, of square pixels and told colours, and captions begin with their rate; from 7 on blocks are mixed, not rows.
FORMAT = 7
SKIPPED_FILE = "skipped.json"
MOST_TOLD = 3  # bad clips in a message; the file has all

Surveys = dict[str, Survey]  # by file name


@dataclass(frozen=True)
class Skipped:
    """A file that is not trained on, and why; ``time_s``: where in it, None: as a whole."""

    file: str
    time_s: float | None
    reason: str


@dataclass(frozen=True)
class Caption:
    """What is told of a scene's windows at one rate, in frames/s."""

    scene: str
    rate: Fraction
    text: str


@dataclass(frozen=True)
class EncodedWindow:
    """An encoded window: ``first_frame`` is that of the video file, ``place`` the order in which rows are kept."""

    caption: Caption
    first_frame: int
    place: tuple[int, int]
    latent: Tensor


def build_cache(settings: DataSettings, encoding: Encoding, cache_dir: Path, progress: bool = True) -> Path:
    """Encode every window and caption into ``cache_dir``, unless its cache is of these already.

    Returns the cache file, which appears whole or not at all. Raises CinemeshError for too many bad clips, for bad
    captions or buckets, latents or embeddings that are not finite, a full disk, and an existing cache that cannot be
    read.
    """
    latents_of(settings.shapes, encoding.codec)
    scenes, clips = settings.scenes(), find_clips(settings.clips)
    by_file = _by_file(scenes, clips)
    recipe = _recipe(settings, encoding, {file: clips[file] for file in by_file}, scenes)
    path = cache_dir / CACHE_FILE
    if path.exists() and (header := read_header(path))["recipe"] == recipe:
        _check_share(settings, [Skipped(**row) for row in header["skipped"]], len(by_file), cache_dir)
        return path
    surveys, skipped = _survey(clips, by_file, progress)
    _write_skipped(cache_dir, skipped)
    _check_share(settings, skipped, len(by_file), cache_dir)
    if skipped:
        told = f"{cache_dir / SKIPPED_FILE} says which, where and why"
        print(f"{len(skipped)} of {len(by_file)} clips are skipped: {told}", file=sys.stderr)
    spans = [span for found in surveys.values() for span in found.spans]
    cuts = settings.cuts(spans)
    captions = _captions(scenes, cuts)
    for cut in encoding.cuts({f"of scene {told.scene}": told.text for told in captions}):
        print(f"{cut}: raise its tokens in data.encoders, or shorten them in {settings.captions}", file=sys.stderr)
    embeddings = _embeddings(encoding, captions)
    rows = _rows(settings, encoding, _windows(clips, by_file, surveys, cuts, progress), scenes)
    number = {told: index for index, told in enumerate(captions)}
    tensors = embeddings | _latents(rows)
    header = {
        "recipe": recipe,
        "codec": asdict(
            encoding.settings
        ),  # for whoever reads the header; the fingerprint in ``recipe`` is what counts
        "captions": [{"scene": told.scene, "rate": str(told.rate), "text": told.text} for told in captions],
        "rows": {
            bucket: {split: [(number[row.caption], row.first_frame) for row in of] for split, of in splits.items()}
            for bucket, splits in rows.items()
        },
        "skipped": [asdict(row) for row in skipped],
        "digests": {name: [row_digest(row) for row in values] for name, values in tensors.items()},
    }
    text = json.dumps(header, default=str)
    _write(path, tensors, {"cinemesh": text, "digest": sha256(text.encode())})
    return path


def decoded_windows(settings: DataSettings, progress: bool = True) -> Iterator[Window]:
    """The windows of a recipe's scenes as they are decoded, nothing encoded; damaged clips are left out.

    Raises CinemeshError as ``build_cache`` does for clips, captions and buckets.
    """
    scenes, clips = settings.scenes(), find_clips(settings.clips)
    by_file = _by_file(scenes, clips)
    surveys, skipped = _survey(clips, by_file, progress)
    if len(skipped) == len(by_file):
        raise CinemeshError(f"no clip can be read: {skipped[0].file}, {skipped[0].reason}", remedy="replace them")
    cuts = settings.cuts([span for found in surveys.values() for span in found.spans])
    yield from _windows(clips, by_file, surveys, cuts, progress)


def _by_file(scenes: Sequence[Scene], clips: Mapping[str, Path]) -> dict[str, list[Scene]]:
    """The scenes of each file. Raises CinemeshError for a file that is not among the clips."""
    found: dict[str, list[Scene]] = {}
    for scene in scenes:
        if scene.file not in clips:
            raise CinemeshError(
                f"scene {scene.name} needs {scene.file}, which is not among the clips "
                f"({', '.join(sorted(clips))}): correct data.clips or the captions file"
            )
        found.setdefault(scene.file, []).append(scene)
    return found


def _recipe(
    settings: DataSettings, encoding: Encoding, clips: Mapping[str, Path], scenes: Sequence[Scene]
) -> dict[str, Any]:
    """All that a cache is made of: where any of it differs, it is another cache."""
    return {
        "format": FORMAT,
        "codec": encoding.codec.fingerprint,
        "encoders": [
            {"name": e.name, "width": e.width, "tokens": e.tokens, "fingerprint": e.fingerprint}
            for e in encoding.encoders
        ],
        "sources": {file: _source(path) for file, path in clips.items()},
        "scenes": [asdict(scene) for scene in scenes],
        "buckets": [{"shape": str(b), "fps": b.fps, "squeeze_from_s": b.squeeze_from_s} for b in settings.shapes],
        "stride": settings.stride,
        "validation_share": settings.validation_share,
    }


def _source(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"  # it is skipped, and once it can be read the cache is another


def _survey(
    clips: Mapping[str, Path], by_file: Mapping[str, Sequence[Scene]], progress: bool
) -> tuple[Surveys, list[Skipped]]:
    """What every clip holds, and those that are skipped."""
    found: Surveys = {}
    skipped: list[Skipped] = []
    for file, here in tqdm(by_file.items(), desc="checking clips", unit="clip", disable=None if progress else True):
        try:
            found[file] = (look_at if is_still(clips[file]) else look_through)(clips[file], here)
        except BadClip as bad:
            skipped.append(Skipped(str(bad.file), None if bad.time_s is None else float(bad.time_s), bad.reason))
    return found, skipped


def _write_skipped(cache_dir: Path, skipped: Sequence[Skipped]) -> None:
    path = cache_dir / SKIPPED_FILE
    if skipped:
        with atomic_file(path) as part:
            part.write_text(json.dumps([asdict(row) for row in skipped], indent=1), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)  # of an earlier build


def _check_share(settings: DataSettings, skipped: Sequence[Skipped], files: int, cache_dir: Path) -> None:
    """Raises CinemeshError where more clips are bad than may be, or all are."""
    if len(skipped) <= settings.bad_share * files and len(skipped) < files:
        return
    told = [
        f"{row.file}{'' if row.time_s is None else f' at {row.time_s:.3f} s'}: {row.reason}"
        for row in skipped[:MOST_TOLD]
    ]
    raise CinemeshError(
        f"{len(skipped)} of {files} clips cannot be trained on, and data.bad_share is {settings.bad_share:g}: "
        f"{', '.join(told)}{', ...' * (len(skipped) > MOST_TOLD)}",
        remedy=f"replace them or leave them out ({cache_dir / SKIPPED_FILE} lists all), or raise data.bad_share",
    )


def _captions(scenes: Sequence[Scene], cuts: Mapping[str, Sequence[Cut]]) -> list[Caption]:
    """One of each scene and rate."""
    return [told for scene in scenes for told in dict.fromkeys(_told(scene, cut) for cut in cuts.get(scene.name, ()))]


def _told(scene: Scene, cut: Cut) -> Caption:
    return Caption(scene.name, cut.rate, scene.caption if cut.still else with_fps(cut.rate, scene.caption))


def _embeddings(encoding: Encoding, captions: Sequence[Caption]) -> dict[str, Tensor]:
    """Text and mask of every caption, by encoder."""
    tensors: dict[str, Tensor] = {}
    for encoder in encoding.encoders:
        pairs = [encoder.encode(told.text) for told in captions]
        for told, (text, _) in zip(captions, pairs, strict=True):
            assert_finite(text, f"the {encoder.name} embedding of the caption of scene {told.scene}")
        tensors[f"text.{encoder.name}"] = torch.stack([text for text, _ in pairs])
        tensors[f"mask.{encoder.name}"] = torch.stack([mask for _, mask in pairs])
    return tensors


def _windows(
    clips: Mapping[str, Path],
    by_file: Mapping[str, Sequence[Scene]],
    surveys: Surveys,
    cuts: Mapping[str, Sequence[Cut]],
    progress: bool,
) -> Iterator[Window]:
    """Every window, as it is decoded."""
    for file, found in tqdm(surveys.items(), desc="encoding clips", unit="clip", disable=None if progress else True):
        if is_still(clips[file]):
            yield from still_windows(clips[file], cuts, by_file[file])
        else:
            yield from read_windows(clips[file], found, cuts, by_file[file])


def _rows(
    settings: DataSettings,
    encoding: Encoding,
    windows: Iterator[Window],
    scenes: Sequence[Scene],
) -> dict[str, dict[str, list[EncodedWindow]]]:
    """By bucket and split, its windows encoded: scene by scene as the captions file has them, then in time."""
    index = {scene.name: number for number, scene in enumerate(scenes)}
    rows: dict[str, dict[str, list[EncodedWindow]]] = {
        str(bucket): {split: list[EncodedWindow]() for split in SPLITS} for bucket in settings.shapes
    }
    for scene, cut, validation, first, frames in windows:
        latent = encoding.codec.encode(frames)
        assert_finite(latent, f"the latent of scene {scene.name} at frame {first}")
        here = rows[str(cut.bucket)][SPLITS[validation]]
        here.append(EncodedWindow(_told(scene, cut), first, (index[scene.name], len(here)), latent))
    for of in (of for splits in rows.values() for of in splits.values()):
        of.sort(key=lambda row: row.place)
    return rows


def _latents(rows: Mapping[str, Mapping[str, Sequence[EncodedWindow]]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for bucket, splits in rows.items():
        shape = splits[SPLITS[0]][0].latent.shape  # every bucket has windows to train on
        for split, of in splits.items():
            tensors[tensor_name(bucket, split)] = (
                torch.stack([row.latent for row in of]) if of else torch.empty(0, *shape)
            )
    return tensors


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
