"""``cinemesh data index``: a manifest of clips where they are, from webdataset and Energon tars and from tables."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...data.manifest import ENDING, ClipManifest, write_manifest
from ...data.scenes import CLIP_SUFFIXES, TAR
from ...data.sources import Tarred
from ...data.tars import TarMember, members
from ...documents import mapping, parse_json, quoted, read_yaml
from ...errors import CinemeshError, did_you_mean
from ...files import check_output_file
from ..progress import progress
from ..written import wrote

ENERGON = ".nv-meta"  # folder that `energon prepare` makes in a dataset
SPLIT_FILE = "split.yaml"
MOST_CAPTION_BYTES = 2**20  # of a sample's .txt or .json
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of shards' names, as webdataset and Energon write them


def run_index(*, sources: Sequence[Path], out: Path, caption: str, split: str) -> None:
    """Raises CinemeshError for a source that is none, a damaged tar, and where no sample has a caption."""
    check_output_file(out, "--out")
    found = [file for source in sources for file in _files(source, split)]
    lacking = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal lacking
        with progress("indexing", len(found)) as begin:
            for file in found:
                begin(file.name)
                if file.suffix.lower() == ENDING:
                    yield from _rows_of_a_table(file)
                    continue
                for row in _rows_of_a_tar(file, caption):
                    if row["caption"]:
                        yield row
                    else:
                        lacking += 1

    count = write_manifest(out, rows())
    if not count:
        out.unlink()
        raise CinemeshError(
            f"none of {lacking:,} samples has a caption", remedy="name its key in their .json with --caption"
        )
    about = f"{count:,} clips" + f", {lacking:,} without a caption are left out" * bool(lacking)
    wrote(out, f"train on them with --set data.captions={out}", about)


def _files(source: Path, split: str) -> list[Path]:
    """The tars and tables of a source."""
    if source.is_dir():
        if (source / ENERGON / SPLIT_FILE).is_file():
            return _of_energon(source, split)
        found = sorted(path for path in source.iterdir() if path.suffix.lower() in (TAR, ENDING))
        if not found:
            raise CinemeshError(
                f"{source} has no {TAR} and no {ENDING}", remedy="name a folder of tars, or their files"
            )
        return found
    if source.suffix.lower() not in (TAR, ENDING) or not source.is_file():
        raise CinemeshError(
            f"{source} is no file that ends in {TAR} or {ENDING}", remedy="name tars, a folder of them, or a manifest"
        )
    return [source]


def _of_energon(folder: Path, split: str) -> list[Path]:
    path = folder / ENERGON / SPLIT_FILE
    told = mapping(read_yaml(path, "Energon's splits", "correct it"), str(path), ("split_parts", "exclude"))
    parts = mapping(told.get("split_parts"), f"{path}: split_parts", told.get("split_parts") or ("train",))
    if split not in parts:
        raise CinemeshError(f"{path} has no split {split!r}", remedy=did_you_mean(split, parts))
    excluded = {name for pattern in told.get("exclude") or [] for name in _expanded(pattern)}
    names = [name for pattern in parts[split] or [] for name in _expanded(pattern) if name not in excluded]
    found = [folder / name for name in names]
    if not names or not all(tar.is_file() for tar in found):
        lost = next((str(tar) for tar in found if not tar.is_file()), "any tar")
        raise CinemeshError(f"{path}: split {split} needs {lost}, which is not there", remedy="restore it")
    return found


def _expanded(pattern: object) -> list[str]:
    """``a_{08..10}.tar`` is a_08.tar, a_09.tar and a_10.tar."""
    if not isinstance(pattern, str):
        raise CinemeshError(f"Energon's splits name {quoted(pattern)}", remedy="they must name tars")
    if (found := _RANGE.search(pattern)) is None:
        return [pattern]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [head + number + rest for number in numbers for rest in _expanded(tail)]


def _rows_of_a_tar(tar: Path, caption: str) -> Iterator[dict[str, Any]]:
    """One a sample that has a clip."""
    for key, group in itertools.groupby(members(tar), key=lambda member: member.key):
        files = list(group)
        clips = [file for file in files if Path(file.name).suffix.lower() in CLIP_SUFFIXES]
        if clips:
            yield {
                "clip": f"{tar.stem}.{key}".replace("/", "-"),
                "file": str(tar.absolute()),
                "member": clips[0].name,
                "offset": clips[0].offset,
                "bytes": clips[0].size,
                "caption": _caption(tar, files, caption),
            }


def _caption(tar: Path, files: Sequence[TarMember], key: str) -> str | None:
    by_ending = {file.extension: file for file in files}
    for ending in ("txt", "json"):
        if (file := by_ending.get(ending)) is None or file.size > MOST_CAPTION_BYTES:
            continue
        with tar.open("rb") as opened:
            opened.seek(file.offset)
            text = opened.read(file.size).decode("utf-8", errors="replace").strip()
        if ending == "txt" and text:
            return text
        if ending == "json":
            found = parse_json(text, f"{tar}: {file.name}", "correct the sample, or leave the tar out")
            if isinstance(found, dict) and isinstance(found.get(key), str) and found[key].strip():
                return found[key].strip()
    return None


def _rows_of_a_table(path: Path) -> Iterator[dict[str, Any]]:
    for scene in ClipManifest(path):
        source = scene.source
        assert source is not None  # of every clip of a manifest
        row: dict[str, Any] = {
            "clip": scene.name,
            "first_s": float(scene.from_s or 0),
            "last_s": None if scene.until_s is None else float(scene.until_s),
            "caption": scene.caption,
            "captions": [{"text": w.text, "weight": w.weight} for w in scene.captions] or None,
            "weight": scene.weight,
        }
        if isinstance(source, Tarred):
            row |= {"member": source.name, "offset": source.offset, "bytes": source.size}
        yield row | {"file": str((source.tar if isinstance(source, Tarred) else source).absolute())}
