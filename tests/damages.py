"""What may happen to the checkpoints of a run, and whether it was met as promised."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import assert_same, body_of, filled, plan_of, rewrite, runner_of, whole_states

from cinemesh.errors import CinemeshError
from cinemesh.launch.storage.places import Location
from cinemesh.launch.training.checkpoint import writing
from cinemesh.launch.training.checkpoint.loading import resume
from cinemesh.launch.training.checkpoint.manifest import MANIFEST
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.model.runner import StepRunner

OLDER, NEWER = "step-00000007", "step-00000009"


def write_runs(directory: Path) -> None:
    """``run`` with two checkpoints, and ``other``, a run of other weights, with the newer."""
    runner, blocks = filled(runner_of(plan_of(""))), writing.BLOCK_ELEMENTS
    writing.BLOCK_ELEMENTS = 50_000  # several of a file
    try:
        save(directory / "run", runner)
        runner.buffers["counters"][0] = 9
        runner.buffers["master"].mul_(2)
        save(directory / "run", runner)
        runner.buffers["ema"].mul_(2)
        save(directory / "other", runner)
    finally:
        writing.BLOCK_ELEMENTS = blocks


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def damages(draw: random.Random, run: Path, other: Path) -> list[tuple[str, Callable[[], object]]]:
    """What may be done to the newer checkpoint of a run, one of each kind: its name, and how."""
    newer, file = run / NEWER, run / NEWER / "00000.safetensors"
    found: list[tuple[str, Callable[[], object]]] = []
    for path in (file, newer / MANIFEST):
        data, name = path.read_bytes(), path.name
        bit, cut = draw.randrange(len(data) * 8), draw.randrange(len(data))
        found += [
            (f"bit {bit} of {name}", partial(flip, path, bit)),
            (f"{name} cut to {cut}", partial(path.write_bytes, data[:cut])),
            (f"{name} longer", partial(path.write_bytes, data + b"\0")),
            (f"{name} deleted", path.unlink),
            (f"{name} of the older", partial(shutil.copy, run / OLDER / name, path)),
            (f"{name} of another run", partial(shutil.copy, other / NEWER / name, path)),
        ]
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    bit = draw.randrange(header * 8)
    body = body_of(newer)
    where = draw.choice(list(paths(body)))
    value = draw.choice([None, -1, 0, 1 << 70, 1.5, "", "x" * 64, [], {}, True])
    if where[-1] == "tp_dim" and value in (None, 0):  # over one tp rank, as good as any
        value = -1
    return [
        *found,
        (f"bit {bit} of the header", partial(flip, file, bit)),
        ("the older under its name", lambda: shutil.copytree(run / OLDER, newer, dirs_exist_ok=True)),
        (f"{where} is {value!r}", lambda: rewrite(newer, put(body, where, value))),
    ]


KINDS = 15


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of what a reader goes by: not what the note, plan or code of a run says."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        if at or key not in ("note", "plan", "code", "updates"):
            yield (*at, key)
            yield from paths(inside, (*at, key))


def put(body: Any, where: tuple[Any, ...], value: object) -> Any:
    inside = body
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    return body


def knock(
    name: str,
    damage: Callable[[], object],
    run: Path,
    runner: StepRunner,
    kept: Callable[[Path], Location] = lambda run: run,
) -> str | None:
    """What was wrong with how a damage was met: loaded, another than the older taken, or not named. None: nothing.

    ``kept``: where the run is read from.
    """
    before = contents(run / NEWER)
    damage()
    if before == contents(run / NEWER):
        return None  # the value that was there
    try:
        found = resume(kept(run), runner)
    except CinemeshError as error:
        return None if "is of another model" in str(error) and "'model'" in name else f"{name}: {error}"
    if found is None or found.path.name != OLDER or [e.path.name for e in found.damaged] != [NEWER]:
        return f"{name}: took {found.path.name if found else None}"
    assert_same(whole_states(runner))
    return None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
