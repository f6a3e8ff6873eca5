"""What people keep of a curated set for finetuning: which clips, from when to when, under which caption (torch-free).

``picks.jsonl`` beside a manifest grows by a line a pick: ``{"clip": "taxi", "person": "ann", "keep": true, "first_s":
2.0, "last_s": 12.6, "caption": "A taxi ...", "flaws": []}``; the last line on a clip counts. A clip with a flaw of the
checklist is not kept. ``last_s`` null is to the end of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.manifest import ClipManifest
from ..data.scenes import Scene
from ..documents import mapping, quoted, read_yaml
from ..errors import CinemeshError, did_you_mean
from ..files import atomic_file
from .bench import json_lines

PICKS_FILE = "picks.jsonl"
CHECKLIST = Path(__file__).parent / "checklist.yaml"
PICK_FORM = "each line is a pick with clip, person, keep, first_s, last_s, caption and flaws"
PICK_KEYS = ("clip", "person", "keep", "first_s", "last_s", "caption", "flaws")


@dataclass(frozen=True)
class Flaw:
    """Of the checklist."""

    name: str
    flaw: str


@dataclass(frozen=True)
class Pick:
    """One person's say on one clip. ``first_s``, ``last_s``: seconds of the file; ``last_s`` None is to its end."""

    clip: str
    person: str
    keep: bool
    first_s: float
    last_s: float | None
    caption: str
    flaws: tuple[str, ...]

    def line(self) -> str:
        """As the file of picks has it."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_checklist() -> list[Flaw]:
    """What ships."""
    rows = read_yaml(CHECKLIST, "the checklist", "install the package anew")
    return [Flaw(**mapping(row, f"the checklist {CHECKLIST}", ("name", "flaw"))) for row in rows]


def clips_to_pick(manifest: Path) -> dict[str, Scene]:
    """The clips of a manifest by name, each a file of its own or a part of one.

    Raises CinemeshError for what is no manifest, for two clips of one name, and for clips in tars, which no browser
    can play.
    """
    found: dict[str, Scene] = {}
    for scene in ClipManifest(manifest):
        if scene.name in found:
            raise CinemeshError(f"{manifest} has two clips {quoted(scene.name)}", remedy="give each a name of its own")
        if not isinstance(scene.source, Path):
            raise CinemeshError(
                f"{manifest}: {quoted(scene.name)} is a member of a tar, which no browser plays",
                remedy="unpack the tars, and curate the files",
            )
        found[scene.name] = scene
    if not found:
        raise CinemeshError(f"{manifest} has no clip", remedy="curate with looser limits")
    return found


def pick_of(row: object, where: str, clips: Mapping[str, Scene], flaws: Iterable[str]) -> Pick:
    """A pick as JSON has it, on one of ``clips``. Raises CinemeshError for anything else."""
    given = mapping(row, where, PICK_KEYS, required=PICK_KEYS)
    for key in ("clip", "person", "caption"):
        if not isinstance(given[key], str) or (key != "caption" and not given[key].strip()):
            raise CinemeshError(f"{where}: {key} is {quoted(given[key])}", remedy="it must be a text")
    if given["clip"] not in clips:
        raise CinemeshError(
            f"{where}: {quoted(given['clip'])} is no clip of the manifest", remedy=did_you_mean(given["clip"], clips)
        )
    if not isinstance(given["keep"], bool):
        raise CinemeshError(f"{where}: keep is {quoted(given['keep'])}", remedy="it is true or false")
    known = [*flaws]
    if not isinstance(given["flaws"], list) or any(flaw not in known for flaw in given["flaws"]):
        raise CinemeshError(f"{where}: flaws are {quoted(given['flaws'])}", remedy=f"known: {', '.join(known)}")
    first, last = _second(given["first_s"], f"{where}: first_s"), given["last_s"]
    last = None if last is None else _second(last, f"{where}: last_s")
    if last is not None and last <= first:
        raise CinemeshError(f"{where}: last_s({last:g}) <= first_s({first:g})", remedy="trim less of the clip")
    scene = clips[given["clip"]]
    if scene.from_s is not None and (first < scene.from_s or _later(last, scene.until_s)):
        raise CinemeshError(
            f"{where}: {_span(first, last)} is not within the clip's {_span(float(scene.from_s), scene.until_s)}",
            remedy="what lies outside it was cut, as another shot: trim only",
        )
    if given["keep"] and given["flaws"]:
        raise CinemeshError(f"{where}: kept with {', '.join(given['flaws'])}", remedy="drop it, or clear the checklist")
    if given["keep"] and not given["caption"].strip():
        raise CinemeshError(f"{where}: kept without a caption", remedy="write what is to be seen")
    return Pick(given["clip"], given["person"], given["keep"], first, last, given["caption"], tuple(given["flaws"]))


def _second(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise CinemeshError(f"{where} is {quoted(value)}", remedy="it is a second of the file, from 0")
    return float(value)


def _later(last: float | None, until: Any) -> bool:
    return until is not None and (last is None or last > float(until))


def _span(first: float, last: Any) -> str:
    return f"{first:g} to {'the end' if last is None else f'{float(last):g}'} s"


def read_picks(manifest: Path, clips: Mapping[str, Scene]) -> dict[str, Pick]:
    """The last pick on each clip, by name; none where there is no file. Raises CinemeshError."""
    path = manifest.with_name(PICKS_FILE)
    if not path.exists():
        return {}
    names = [flaw.name for flaw in read_checklist()]
    lines = json_lines(path, "the picks", PICK_FORM, grows=True)
    return {pick.clip: pick for pick in (pick_of(row, where, clips, names) for row, where in lines)}


def write_picked(manifest: Path, out: Path, clips: Mapping[str, Scene], picks: Mapping[str, Pick]) -> int:
    """A manifest of what was kept, trimmed and with its captions; how many clips. All other columns stay.

    Raises CinemeshError where nothing was kept.
    """
    kept = {name: pick for name, pick in picks.items() if pick.keep}
    if not kept:
        raise CinemeshError(f"no clip of {manifest} was kept", remedy="cinemesh pick serve: let people look at them")
    table = pq.read_table(manifest)
    rows = [index for index, name in enumerate(clips) if name in kept]
    chosen = [kept[name] for name in clips if name in kept]
    table = table.take(rows)
    values: dict[str, tuple[list[Any], pa.DataType]] = {
        "clip": ([pick.clip for pick in chosen], pa.string()),
        "file": ([str(Path(str(clips[pick.clip].source)).absolute()) for pick in chosen], pa.string()),
        "first_s": ([pick.first_s for pick in chosen], pa.float64()),
        "last_s": ([pick.last_s for pick in chosen], pa.float64()),
        "caption": ([pick.caption for pick in chosen], pa.string()),
    }
    if "captions" in table.schema.names:  # a person wrote one, which is the only one now
        table = table.drop_columns(["captions"])
    for name, (column, kind) in values.items():
        made = pa.array(column, kind)
        at = table.schema.get_field_index(name)
        table = table.append_column(name, made) if at < 0 else table.set_column(at, pa.field(name, kind), made)
    with atomic_file(out) as part:
        pq.write_table(table, part)
    return len(chosen)
