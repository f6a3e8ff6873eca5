"""``cinemesh data show``, ``check``, ``withdraw`` and ``seen``: the versions of a latent cache, and what runs drew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...data.cache.held import Block
from ...data.cache.index import CAPTION_ROWS, Index
from ...data.cache.storage import Storage
from ...data.cache.version import SPLITS, Version, version_names
from ...data.cache.version import withdraw as withdrawn_from
from ...errors import CinemeshError
from ..progress import progress
from ..tables import new_console, plain_table
from ..training.seen import seen
from ..written import wrote

CHECKED_ROWS = 256  # read at once
MOST_TOLD = 20  # damaged rows; the others are counted
TOLD_STEPS = 12  # told of a bucket in the table; --json has all


def run_show(*, cache: Path, as_json: bool) -> None:
    """Versions with their rows, the newest last."""
    told: list[dict[str, Any]] = []
    for name in _names(cache):
        version = Version.read(Storage(str(cache)), name)
        rows = {
            b.bucket: {"train": b.rows, "validation": sum(part.rows for part in b.validation)} for b in version.buckets
        }
        told.append({
            "version": name, "after": version.after, "buckets": rows, "shards": len(version.shards),
            "clips": version.clips, "skipped": version.skipped, "withdrawn": len(version.withdrawn),
        })  # fmt: skip
    if as_json:
        print(json.dumps(told, indent=1))
        return
    table = plain_table("version", "after", "bucket", "train", "validation", "withdrawn", right=("train", "validation"))
    for one in told:
        for bucket, rows in one["buckets"].items():
            numbers = [f"{rows[split]:,}" for split in SPLITS]
            table.add_row(one["version"], one["after"] or "-", bucket, *numbers, str(one["withdrawn"]))
    new_console().print(table)


def run_check(*, cache: Path, version: str | None) -> int:
    """1 when something is damaged: each row is told."""
    storage = Storage(str(cache))
    found = Version.read(storage, version or _names(cache)[-1])
    lists = [
        *(Index(storage, b.of(split)) for b in found.buckets for split in SPLITS),
        Index(storage, found.captions, CAPTION_ROWS),
    ]
    total = sum(-(-len(index) // CHECKED_ROWS) for index in lists)
    damaged: dict[str, None] = {}
    rows = 0
    with progress("checking", total) as begin:
        for index in lists:
            for first in range(0, len(index), CHECKED_ROWS):
                begin(f"{rows:,} rows")
                at = index.rows(first, min(CHECKED_ROWS, len(index) - first))
                rows += len(at)
                for row in at:
                    try:
                        Block(storage, found.shards, [row]).arrays(row)
                    except CinemeshError as error:
                        damaged[error.problem] = None
    for problem in [*damaged][:MOST_TOLD]:
        print(problem)
    if len(damaged) > MOST_TOLD:
        print(f"and {len(damaged) - MOST_TOLD:,} more")
    print(f"version {found.name}: {rows:,} rows, {len(damaged):,} damaged")
    return int(bool(damaged))


def run_withdraw(*, cache: Path, clips: Sequence[str], version: str | None) -> None:
    """Make a version without clips; how a run goes on with it."""
    made = withdrawn_from(cache, version or _names(cache)[-1], clips)
    rows = ", ".join(f"{bucket.bucket} {bucket.rows:,}" for bucket in made.buckets)
    print(f"version {made.name} lacks {len(made.withdrawn):,} clips and has to train on: {rows}")
    wrote(
        cache / made.file,
        f"a run that drew from {made.after} goes on with --set 'data.versions={{0: {made.after}, STEP: {made.name}}}'",
    )


def run_seen(*, run: Path, clip: str | None, sample_id: int | None, as_json: bool) -> None:
    """Steps that drew a clip or a window."""
    if (clip is None) == (sample_id is None):
        raise CinemeshError("data seen takes --clip or --id", remedy="give one of them")
    until, where = seen(run, clip=clip, sample_id=sample_id)
    if as_json:
        print(json.dumps({"until": until, "seen": [asdict(one) for one in where]}, indent=1))
        return
    for one in where:
        steps = ", ".join(f"{step:,}" for step in one.steps[:TOLD_STEPS]) + ", ..." * (len(one.steps) > TOLD_STEPS)
        print(
            f"version {one.version}, bucket {one.bucket}: {one.rows} rows an epoch, drawn {len(one.steps):,} times in "
            f"steps 1 to {until:,}{': ' * bool(steps)}{steps}"
        )


def _names(cache: Path) -> list[str]:
    found = version_names(cache)
    if not found:
        raise CinemeshError(
            f"{cache} holds no version of a latent cache", remedy="build one: cinemesh data build CONFIG"
        )
    return found
