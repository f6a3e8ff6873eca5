"""Encoding a unit: the windows of its scenes, and their captions, each into a folder that appears whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save

from ...model.inputs import LATENTS
from ..encoding import Encoding
from ..scenes import SceneTime
from ..settings import Cut
from ..tars import TarWriter
from ..text import with_fps
from ..video import Window
from .index import write_index_rows
from .samples import LATENT, TEXT, TEXT_MASK, assert_finite
from .version import SPLITS
from .work import whole_folder

ROWS = "rows.parquet"  # of a unit's folder
CAPTIONS_TAR = "captions.tar"


@dataclass(frozen=True)
class UnitFiles:
    """Where a unit is, by its keys."""

    LATENTS: ClassVar[str] = "latents"
    CAPTIONS: ClassVar[str] = "captions"

    root: Path
    latents: str
    captions: str

    def tar(self, bucket: str, split: str) -> str:
        """Of the windows of a bucket and split, below the root."""
        return f"{self.LATENTS}/{self.latents}/{tar_name(bucket, split)}"

    @property
    def captions_tar(self) -> str:
        return f"{self.CAPTIONS}/{self.captions}/{CAPTIONS_TAR}"

    def latent_rows(self) -> pa.Table:
        """Of its windows, tar after tar, as they lie there."""
        return pq.read_table(self.root / self.LATENTS / self.latents / ROWS)

    def caption_rows(self) -> pa.Table:
        return pq.read_table(self.root / self.CAPTIONS / self.captions / ROWS)


@dataclass(frozen=True)
class Caption:
    """A wording of what is told of a clip's windows at one rate, in frames/s."""

    clip: str
    rate: Fraction
    text: str


def tar_name(bucket: str, split: str) -> str:
    return f"{bucket}.{split}.tar"


def told_captions(spans: Iterable[SceneTime], cut: Callable[[SceneTime], Sequence[Cut]]) -> list[Caption]:
    """Every wording of each scene at each of its rates, in order."""
    found: list[Caption] = []
    for span in spans:
        scene = span.scene
        for rate, still in dict.fromkeys((cut.rate, cut.still) for cut in cut(span)):
            for wording in scene.wordings:
                text = wording.text if still else with_fps(rate, wording.text)
                found.append(Caption(scene.name, rate, text))
    return found


def write_windows(path: Path, encoding: Encoding, windows: Iterator[Window], buckets: Sequence[str]) -> None:
    """Encode windows as they come, each into the tar of its bucket and split.

    Raises CinemeshError for a latent that is not finite, and when it cannot be written.
    """
    with whole_folder(path) as part:
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {(b, split): [] for b in buckets for split in SPLITS}
        tars: dict[tuple[str, str], TarWriter] = {}
        try:
            for scene, cut, validation, first, frames in windows:
                made = encoding.window(frames, scene.name, first)
                for latent in made.values():
                    assert_finite(latent, f"the latent of scene {scene.name} at frame {first}")
                key = str(cut.bucket), SPLITS[validation]
                if key not in tars:
                    tars[key] = TarWriter(part / tar_name(*key))
                data = save({LATENT if name == LATENTS else name: each.contiguous() for name, each in made.items()})
                offset, crc = tars[key].add(data)
                rows[key].append({
                    "bucket": key[0], "split": key[1], "clip": scene.name, "first_frame": first,
                    "fps_num": cut.rate.numerator, "fps_den": cut.rate.denominator,
                    "offset": offset, "bytes": len(data), "crc": crc,
                })  # fmt: skip
        finally:
            for tar in tars.values():
                tar.close()
        write_index_rows(pa.Table.from_pylist([row for of in rows.values() for row in of], UNIT_LATENTS), part / ROWS)


def encode_captions(path: Path, encoding: Encoding, captions: Sequence[Caption], told_in: Path) -> None:
    """Encode captions into one tar. Raises CinemeshError as ``write_windows``; says which are cut."""
    if captions:
        texts = {f"of scene {told.clip}": told.text for told in captions}
        for cut in encoding.cuts(texts):
            print(f"{cut}: raise its tokens in data.encoders, or shorten them in {told_in}", file=sys.stderr)
        for unknown in encoding.unknown(texts):
            print(f"{unknown}: translate them in {told_in}, or take an encoder of bytes", file=sys.stderr)
    with whole_folder(path) as part:
        tar = TarWriter(part / CAPTIONS_TAR)
        rows: list[dict[str, Any]] = []
        try:
            for told in captions:
                made: dict[str, Any] = {}
                for encoder in encoding.encoders:
                    text, mask = encoder.encode(told.text)
                    assert_finite(text, f"the {encoder.name} embedding of the caption of scene {told.clip}")
                    made |= {TEXT + encoder.name: text.contiguous(), TEXT_MASK + encoder.name: mask.contiguous()}
                data = save(made)
                offset, crc = tar.add(data)
                rate = {"fps_num": told.rate.numerator, "fps_den": told.rate.denominator}
                where = {"offset": offset, "bytes": len(data), "crc": crc}
                rows.append({"clip": told.clip, "text": told.text} | rate | where)
        finally:
            tar.close()
        write_index_rows(pa.Table.from_pylist(rows, UNIT_CAPTIONS), part / ROWS)


_RATE = [("fps_num", pa.int32()), ("fps_den", pa.int32())]
_WHERE = [("offset", pa.int64()), ("bytes", pa.int64()), ("crc", pa.uint32())]
_WINDOW = [("bucket", pa.string()), ("split", pa.string()), ("clip", pa.string()), ("first_frame", pa.int64())]
UNIT_LATENTS = pa.schema([*_WINDOW, *_RATE, *_WHERE])
UNIT_CAPTIONS = pa.schema([("clip", pa.string()), ("text", pa.string()), *_RATE, *_WHERE])
