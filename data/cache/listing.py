"""From encoded units to a version: their rows in order, each as often as an epoch takes it, and their captions.

[Note: weights] A window of a clip is listed weight * count / n times on average, where n windows of the clip are in the
bucket and ``count`` is what ``balance`` makes of n: with n_max of the clip that has most, n_max * (n / n_max) **
(1 - balance). Row j of them is listed floor((j + 1) r + u) - floor(j r + u) times: evenly, in all n r times to within
one; u is 0 for weight 1, else a number in [0, 1) from the digest of the clip's name, so others change nothing of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import CinemeshError
from ...kernels.ops import MOST_IDS
from ..encoding import Encoding
from ..scenes import Scene
from ..settings import DataSettings
from .index import CAPTION_ROWS, LATENT_ROWS, IndexWriter, is_any_of
from .units import UnitFiles
from .version import SPLITS, BucketRows, EncoderTold, Version, rate_text

FORMAT = 1  # of a version


@dataclass(frozen=True)
class Listing:
    """What a version is listed from: ``clips`` files, ``skipped`` of them not."""

    root: Path
    settings: DataSettings
    encoding: Encoding
    units: Sequence[UnitFiles]
    scenes: Sequence[Scene]
    before: Version | None
    withdrawn: Sequence[str]
    clips: int
    skipped: int

    def version(self) -> Version:
        """With its index written. Raises CinemeshError for more ids than there are, and a bucket left with no row."""
        units, next_id = self._ids()
        shards: list[str] = []
        captions, places = self._captions(shards)
        buckets: list[BucketRows] = []
        for bucket in map(str, self.settings.shapes):
            parts: dict[str, Any] = {}
            rates = Counter[str]()
            size = 0
            for split in SPLITS:
                writer = IndexWriter(self.root, f"{bucket}.{split}", LATENT_ROWS)
                for unit in self.units:
                    rows = self._rows(unit, units[unit.latents], bucket, split)
                    if not rows.num_rows:
                        continue
                    shards.append(unit.tar(bucket, split))
                    size = rows.column("bytes")[0].as_py()
                    if split == SPLITS[0]:
                        rates.update(_rates(rows))
                    writer.add(self._told(rows, len(shards) - 1, places))
                parts[split] = tuple(writer.close())
            if not parts[SPLITS[0]]:
                raise CinemeshError(
                    f"bucket {bucket} has nothing to train on: weights, or clips that were withdrawn, leave no row",
                    remedy="raise the weights, or leave the bucket out of data.buckets",
                )
            buckets.append(BucketRows(bucket, parts["train"], parts["validation"], dict(sorted(rates.items())), size))
        encoders = tuple(EncoderTold(e.name, e.width, e.tokens, e.fingerprint) for e in self.encoding.encoders)
        return Version(
            FORMAT, None if self.before is None else self.before.name, self.encoding.codec.fingerprint, encoders,
            tuple(shards), tuple(buckets), captions, units, next_id, tuple(sorted(self.withdrawn)), self.clips,
            self.skipped,
        )  # fmt: skip

    def _ids(self) -> tuple[dict[str, int], int]:
        """First id of each unit's windows: those of the version before keep theirs."""
        known = {} if self.before is None else self.before.units
        next_id = 0 if self.before is None else self.before.next_id
        units: dict[str, int] = {}
        for unit in self.units:
            if unit.latents not in known and unit.latents not in units:
                units[unit.latents], next_id = next_id, next_id + unit.latent_rows().num_rows
            else:
                units.setdefault(unit.latents, known.get(unit.latents, 0))
        if next_id > MOST_IDS:
            raise CinemeshError(
                f"{next_id:,} windows, with those of the versions before, have no ids: there are {MOST_IDS:,}",
                remedy="raise data.stride, or begin another line of versions",
            )
        return units, next_id

    def _captions(self, shards: list[str]) -> tuple[Any, dict[tuple[str, int, int], tuple[int, int]]]:
        """Their index, and of each clip and rate the first row there, and how many."""
        weights = {scene.name: [w.weight for w in scene.wordings] for scene in self.scenes if scene.captions}
        writer = IndexWriter(self.root, "captions", CAPTION_ROWS)
        places: dict[tuple[str, int, int], tuple[int, int]] = {}
        row = 0
        for unit in self.units:
            table = unit.caption_rows()
            if not table.num_rows:
                continue
            shards.append(unit.captions_tar)
            told: list[float] = []
            for one in table.select(["clip", "fps_num", "fps_den"]).to_pylist():
                key = one["clip"], one["fps_num"], one["fps_den"]
                first, count = places.get(key, (row, 0))
                told.append(weights.get(one["clip"], [1.0])[count])
                places[key] = first, count + 1
                row += 1
            table = table.append_column("weight", pa.array(told, pa.float32()))
            writer.add(table.append_column("shard", pa.array([len(shards) - 1] * table.num_rows, pa.int32())))
        return tuple(writer.close()), places

    def _rows(self, unit: UnitFiles, first_id: int, bucket: str, split: str) -> pa.Table:
        """Of a unit, those of a bucket and split, as often as an epoch takes them."""
        table = unit.latent_rows()
        table = table.append_column("id", pa.array(np.arange(first_id, first_id + table.num_rows), pa.uint32()))
        table = table.filter((pc.field("bucket") == bucket) & (pc.field("split") == split))
        weight = np.array([self._weights.get(clip, 1.0) for clip in table.column("clip").to_pylist()])
        table = table.append_column("weight", pa.array(weight, pa.float32()))
        gone = is_any_of(table.column("clip"), self.withdrawn)
        if split != SPLITS[0]:
            return table.filter(pa.array(~gone & (weight > 0)))
        times = self._times(bucket, table.column("clip").to_pylist(), weight)
        return table.take(np.repeat(np.arange(len(times)), np.where(gone, 0, times)))

    def _times(self, bucket: str, clips: Sequence[str], weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """How often each row is listed: see [Note: weights]."""
        times = np.ones(len(clips), np.int64)
        numbers: dict[str, list[int]] = {}
        for number, clip in enumerate(clips):
            numbers.setdefault(clip, []).append(number)
        for clip, own in numbers.items():
            weight, n = float(weights[own[0]]), len(own)
            most = self._most[bucket] if self.settings.balance else n
            count = round(most * (n / most) ** (1 - self.settings.balance))
            if weight == 1.0 and count == n:
                continue
            begin = 0.0 if weight == 1.0 else _drawn(f"{bucket} {clip}")
            steps = np.floor(weight * count * np.arange(n + 1) / n + begin).astype(np.int64)
            times[own] = np.diff(steps)
        return times

    @cached_property
    def _weights(self) -> dict[str, float]:
        return {scene.name: scene.weight for scene in self.scenes if scene.weight != 1.0}

    @cached_property
    def _most(self) -> dict[str, int]:
        """Training windows of the clip that has most, by bucket."""
        most = Counter[str]()
        for unit in self.units:
            table = unit.latent_rows().filter(pc.field("split") == SPLITS[0])
            for row in table.group_by(["bucket", "clip"]).aggregate([([], "count_all")]).to_pylist():
                if row["clip"] not in self.withdrawn:
                    most[row["bucket"]] = max(most[row["bucket"]], row["count_all"])
        return most

    @staticmethod
    def _told(rows: pa.Table, shard: int, places: dict[tuple[str, int, int], tuple[int, int]]) -> pa.Table:
        """As the index has them."""
        keys = zip(*(rows.column(name).to_pylist() for name in ("clip", "fps_num", "fps_den")), strict=True)
        found = [places[key] for key in keys]
        columns = {
            "shard": pa.array([shard] * rows.num_rows, pa.int32()),
            "caption": pa.array([first for first, _ in found], pa.int64()),
            "captions": pa.array([count for _, count in found], pa.int16()),
        }
        for name, values in columns.items():
            rows = rows.append_column(name, values)
        return rows.select(LATENT_ROWS.names).cast(LATENT_ROWS)


def _rates(rows: pa.Table) -> Counter[str]:
    counted = Counter[str]()
    for row in rows.group_by(["fps_num", "fps_den"]).aggregate([([], "count_all")]).to_pylist():
        counted[rate_text(row["fps_num"], row["fps_den"])] += row["count_all"]
    return counted


def _drawn(text: str) -> float:
    """A number in [0, 1), always the same of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
