"""Versions of a cache: which rows there are, in which order, and what they were made of. Immutable.

A version is a file of ``versions/``, named by the digest of what it says, which names its index by digests too.
``withdrawn.json`` lists the clips that no later version holds, and that no run draws again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa

from ...documents import parse_json, quoted, read_json
from ...errors import CinemeshError, did_you_mean
from ...files import atomic_file
from ...reading import read_record
from .digests import short_digest
from .index import Index, IndexPart, is_any_of, write_index_part
from .storage import Storage

FOLDER = "versions"
WITHDRAWN = "withdrawn.json"
SPLITS = ("train", "validation")
BUILD_AGAIN = "restore it, or delete it and build the cache again: no latent is encoded anew"


@dataclass(frozen=True)
class BucketRows:
    """The rows of one bucket: ``rates`` counts its training rows by frames/s, written as fractions."""

    bucket: str
    train: tuple[IndexPart, ...]
    validation: tuple[IndexPart, ...]
    rates: dict[str, int]
    latent_bytes: int  # of a sample's tensors in its tar

    def of(self, split: str) -> tuple[IndexPart, ...]:
        return self.train if split == SPLITS[0] else self.validation

    @property
    def rows(self) -> int:
        """To train on."""
        return sum(part.rows for part in self.train)


@dataclass(frozen=True)
class EncoderTold:
    """A text encoder, by what it makes."""

    name: str
    width: int
    tokens: int
    fingerprint: str


@dataclass(frozen=True)
class Version:
    """What a version says. ``units``: first id of each unit's windows; ``next_id``: of one that is added."""

    format: int
    after: str | None  # the version before, whose ids it goes on from
    codec: str  # fingerprint
    encoders: tuple[EncoderTold, ...]
    shards: tuple[str, ...]
    buckets: tuple[BucketRows, ...]
    captions: tuple[IndexPart, ...]
    units: dict[str, int]
    next_id: int
    withdrawn: tuple[str, ...]
    clips: int
    skipped: int

    @property
    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @property
    def name(self) -> str:
        """By which recipes, checkpoints and commands call it."""
        return short_digest(self.text)

    @property
    def file(self) -> str:
        return f"{FOLDER}/{self.name}.json"

    def write(self, root: Path) -> str:
        """Into a cache, unless it is there; its name."""
        if not (root / self.file).exists():
            with atomic_file(root / self.file) as unfinished:
                unfinished.write_text(self.text, encoding="utf-8")
        return self.name

    @classmethod
    def of(cls, root: Path, name: str) -> Version:
        """That of a mounted folder. Raises CinemeshError as ``read``."""
        return cls.read(Storage(str(root)), name)

    @classmethod
    def read(cls, storage: Storage, name: str) -> Version:
        """Raises CinemeshError for one that is not there, and for one that is not as it was written."""
        file = f"{FOLDER}/{name}.json"
        if not storage.exists(file):
            there = [path.stem for path in Path(storage.root, FOLDER).glob("*.json")]
            raise CinemeshError(
                f"the latent cache {storage.root} has no version {quoted(name)}",
                remedy=did_you_mean(name, there) if there else "build it first: cinemesh data build",
            )
        text = storage.all(file).decode(errors="replace")
        if short_digest(text) != name:
            raise CinemeshError(f"{storage.place(file)} is not what its name says", remedy=BUILD_AGAIN)
        told = parse_json(text, storage.place(file), BUILD_AGAIN)
        return read_record(cls, told, storage.place(file))


def version_names(root: Path) -> list[str]:
    """Names of all of a cache, the newest last."""
    paths = sorted((root / FOLDER).glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [path.stem for path in paths]


def withdrawn(root: Path) -> list[str]:
    """Clips that were withdrawn from a cache, by name."""
    path = root / WITHDRAWN
    if not path.exists():
        return []
    found = read_json(path, "the list of withdrawn clips", "restore it: what it names must not be trained on")
    if not isinstance(found, list) or not all(isinstance(clip, str) for clip in found):
        raise CinemeshError(f"{path} is no list of clips", remedy="restore it: what it names must not be trained on")
    return found


def withdraw(root: Path, name: str, clips: Collection[str]) -> Version:
    """A version without the rows of ``clips``, after version ``name``; they are in no later one. Written.

    Raises CinemeshError for a clip of which the version has no row.
    """
    storage = Storage(str(root))
    version = Version.read(storage, name)
    gone = sorted({*withdrawn(root), *clips})
    lacking = {*clips}
    buckets: list[BucketRows] = []
    for bucket in version.buckets:
        rates, changed = dict(bucket.rates), {}
        for split in SPLITS:
            parts: list[IndexPart] = []
            for part in bucket.of(split):
                (table,) = Index(storage, [part]).columns()
                held = is_any_of(table.column("clip"), gone)
                out = table.filter(pa.array(held))
                lacking -= {*out.column("clip").to_pylist()}
                if split == SPLITS[0]:
                    for num, den in zip(*(out.column(of).to_pylist() for of in ("fps_num", "fps_den")), strict=True):
                        rates[rate_text(num, den)] -= 1
                left = table.filter(pa.array(~held))
                if not out.num_rows:
                    parts.append(part)
                elif left.num_rows:
                    parts.append(write_index_part(root, f"{bucket.bucket}.{split}", left))
            changed[split] = tuple(parts)
        if not changed[SPLITS[0]]:
            raise CinemeshError(
                f"without these clips bucket {bucket.bucket} of version {name} has nothing to train on",
                remedy="leave the bucket out of data.buckets, or add rows first",
            )
        counted = {rate: count for rate, count in rates.items() if count}
        buckets.append(replace(bucket, rates=counted, **changed))
    if lacking:
        raise CinemeshError(
            f"version {name} of {root} has no row of clip {', '.join(sorted(lacking))}",
            remedy="name clips as the captions file, or the manifest, does",
        )
    with atomic_file(root / WITHDRAWN) as unfinished:  # before the version: no run draws them from here on
        unfinished.write_text(json.dumps(gone, indent=1), encoding="utf-8")
    made = replace(version, after=name, buckets=tuple(buckets), withdrawn=tuple(gone))
    made.write(root)
    return made


def rate_text(num: int, den: int) -> str:
    """Frames/s as ``Fraction`` writes and reads them."""
    return str(num) if den == 1 else f"{num}/{den}"


@dataclass(frozen=True)
class VersionChange:
    """From step ``step`` on, a run draws of version ``version``."""

    step: int
    version: str


def history_text(changes: Sequence[VersionChange]) -> str:
    """As ``0: 0123456789abcdef, 5000: ...``: for a message, and to be typed."""
    return ", ".join(f"{change.step}: {change.version}" for change in changes)


def changes_of(given: Mapping[str, str]) -> list[VersionChange]:
    """From steps, as a recipe's keys, to versions. Raises CinemeshError for a step that is none, and without step 0."""
    found: list[VersionChange] = []
    for step, version in given.items():
        if not step.isascii() or not step.isdigit():
            raise CinemeshError(f"data.versions: {quoted(step)} is no step", remedy="write {0: VERSION, 5000: VERSION}")
        found.append(VersionChange(int(step), version))
    found.sort(key=lambda change: change.step)
    if found and found[0].step != 0:
        raise CinemeshError(
            f"data.versions begins at step {found[0].step}", remedy="say which version the run begins with, at step 0"
        )
    if len({change.step for change in found}) < len(found):
        raise CinemeshError("data.versions names a step twice", remedy="a step has one version")
    return found
