"""Damage: nothing that is not as it was written is loaded; each checkpoint that was passed over is named, and why."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import COUNTED, body_of, filled, plan_of, rewrite, runner_of, whole_states
from damages import KINDS, NEWER, OLDER, damages, flip, knock, write_runs
from harness import Pool

from cinemesh.errors import CinemeshError
from cinemesh.launch.storage.places import write_file
from cinemesh.launch.training.checkpoint import choosing, loading, publishing
from cinemesh.launch.training.checkpoint.choosing import check_files, latest, published
from cinemesh.launch.training.checkpoint.loading import load, load_weights, resume
from cinemesh.launch.training.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    SAVED_STATES,
    Damaged,
    Manifest,
    read_manifest,
    sealed,
)
from cinemesh.launch.training.checkpoint.publishing import UNFINISHED, clear, make_room, publish, remove
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    write_runs(directory)
    return directory


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "run", tmp_path / "run"))


@pytest.mark.parametrize("kind", range(KINDS))
def test_no_damage_is_loaded_and_the_newest_whole_one_is_taken(run: Path, runs: Path, kind: int) -> None:
    """One of each kind; ``tests/benchmarks/checkpoints_30b.py`` has hundreds."""
    listed = damages(random.Random(kind), run, runs / "other")
    assert len(listed) == KINDS
    assert knock(*listed[kind], run, runner_of(plan_of(""))) is None


def test_what_passes_where_nothing_is_checked(run: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of the guard: without digests of blocks and states, a flipped bit is loaded, and ``knock`` says so."""
    monkeypatch.setattr(loading, "block_digest", Anything())
    monkeypatch.setattr(loading, "digest", Anything())
    path = run / NEWER / "00000.safetensors"
    told = knock("a bit", partial(flip, path, path.stat().st_size * 8 - 1), run, runner_of(plan_of("")))
    assert told is not None and f"took {NEWER}" in told


class Anything:
    """Answers what is equal to all."""

    def __call__(self, *_: object) -> Anything:
        return self

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def test_each_one_passed_over_is_told(run: Path) -> None:
    """Two of two: that is no reason to begin from step 0, which would write over what is left."""
    (run / NEWER / "00000.safetensors").write_bytes(b"")
    runner = runner_of(plan_of(""))
    resumed = resume(run, runner)
    assert resumed is not None and resumed.path == run / OLDER and runner.buffers["counters"].tolist() == COUNTED
    (told,) = resumed.damaged
    assert re.search(r"step-00000009 is damaged: 00000\.safetensors has 0 bytes, it was written with", told.problem)
    assert latest(run) == run / OLDER
    (run / OLDER / MANIFEST).unlink()
    for read in (lambda: resume(run, runner), lambda: latest(run)):
        with pytest.raises(CinemeshError, match=r"step-00000009 is not whole .*, and 1 before it are not .*step 0"):
            read()
    shutil.rmtree(run / NEWER)
    with pytest.raises(CinemeshError, match=r"step-00000007 is not whole \(it has no cinemesh.json.*there is no other"):
        resume(run, runner)
    shutil.rmtree(run / OLDER)
    assert resume(run, runner) is None and latest(run) is None
    assert resume(run / "absent", runner) is None


def test_a_save_that_was_broken_off_is_none(run: Path) -> None:
    """A kill in the middle of one leaves the older one, and no warning."""
    (run / NEWER / MANIFEST).unlink()
    (run / NEWER / UNFINISHED).touch()
    (run / "step-11").mkdir()
    resumed = resume(run, runner_of(plan_of("")))
    assert resumed is not None and resumed.path.name == OLDER and not resumed.damaged


CALLS = ("os.mkdir", "open", "os.rename", "os.link", "os.remove", "os.rmdir")  # as Python's audit hooks name them


def killed_before_call(number: int, work: Callable[[], None]) -> bool:
    """Whether a process that does ``work`` comes to so many calls that change files; it dies of no more than that."""
    if not (child := os.fork()):
        left = [number]

        def hook(event: str, _: object) -> None:
            if event in CALLS:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def damaged_of_all_kills(runs: Path, directory: Path) -> list[str]:
    """A checkpoint is replaced by one of the same step, then the one before it is removed: killed before every call."""
    found: list[str] = []
    for number in range(1000):
        run = Path(shutil.copytree(runs / "run", directory / str(number)))
        manifest, data = read_manifest(run / NEWER), (run / NEWER / "00000.safetensors").read_bytes()

        def work(run: Path = run, manifest: Manifest = manifest, data: bytes = data) -> None:
            make_room(run, run / NEWER, 1, 1)
            write_file(run / NEWER / "00000.safetensors", [memoryview(data)])
            publish(manifest, run / NEWER)
            remove(run / OLDER)

        killed = killed_before_call(number, work)
        whole = 0
        for path in published(run):
            try:
                check_files(path, read_manifest(path))
                whole += 1
            except Damaged as error:
                found.append(error.damage)
        assert whole, number
        clear(run)
        assert [*published(run)] == sorted(run.iterdir(), reverse=True)
        if not killed:
            assert number > 20
            return found
    raise AssertionError


def test_a_kill_at_any_moment_leaves_whole_checkpoints_alone(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between a folder and its mark, where it has neither that nor a manifest; the planted fault says so."""
    assert not damaged_of_all_kills(runs, tmp_path / "as-it-is")

    def marked(folder: Path) -> bool:
        return (folder / UNFINISHED).exists() and not (folder / MANIFEST).exists()

    for module in (choosing, publishing):
        monkeypatch.setattr(module, "is_unfinished", marked)
    (damage,) = set(damaged_of_all_kills(runs, tmp_path / "planted"))
    assert damage.startswith("it has no cinemesh.json")


@pytest.mark.parametrize(
    "text", ["[]", "{}", "", "null", "[" * 100_000, '{"format": "3"}', '{"format": true}', '{"a": 1, "a": 2}']
)
def test_a_manifest_that_is_none_is_damage(run: Path, text: str) -> None:
    (run / NEWER / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match=NEWER):
        read_manifest(run / NEWER)


def changed(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return body | changes


def in_file(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return body | {"files": [body["files"][0] | changes]}


def in_part(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return in_file(body, parts=[body["files"][0]["parts"][0] | changes])


def in_unit(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    first, *others = body["layout"]["units"]
    return body | {"layout": body["layout"] | {"units": [first | changes, *others]}}


@pytest.mark.parametrize(
    ("change", "values", "told"),
    [
        (in_file, {"name": "../../../.bashrc"}, "'../../../.bashrc', and files are called after it"),
        (in_file, {"name": "/etc/passwd"}, "'/etc/passwd'"),
        (in_part, {"stop": 1}, "the digests of 00000.safetensors"),
        (in_part, {"start": 1}, "the size of 00000.safetensors"),
        (in_file, {"size_bytes": 9}, "the size of 00000.safetensors is 9"),
        (in_part, {"at": {"tp": 1, "cp": 0, "dp_shard": 0}}, "tp of part 0 of file 0, of 1, is 1"),
        (in_part, {"begin": 9}, "the size of 00000.safetensors is"),
        (in_part, {"extra": 1}, "unknown key 'extra'"),
        (in_file, {"parts": []}, "parts of file 0 is []"),
        (in_file, {"header": "0"}, "the digests of 00000.safetensors"),
        (in_file, {"extra": 1}, "unknown key 'extra'"),
        (in_unit, {"axes": ["tp"]}, "axes of unit 0 is ['tp']"),
        (in_unit, {"elements": 1}, "behind the start of 'the end' at 1"),
        (in_unit, {"position": 128}, "behind the start of"),
        (in_unit, {"parameters": [{"name": "a", "shape": [0], "tp_dim": None, "offset": 0}]}, "a dim of parameter 0"),
        (in_unit, {"parameters": [{"name": "a", "shape": [4], "tp_dim": 1, "offset": 0}]}, "tp_dim of parameter 0"),
        (changed, {"files": []}, "its files are of 0 shards, not 1"),
        (changed, {"states": {"ema": "int3"}}, "states is {'ema': 'int3'}"),
        (changed, {"model": {"encoders": [3]}}, "encoders is [3]"),
        (changed, {"block_elements": 0}, "block_elements is 0"),
        (changed, {"step": True}, "step is True"),
        (changed, {"step": 8}, "it is of step 8"),
        (changed, {"layout": []}, "layout"),
    ],
)
def test_a_manifest_that_nothing_here_wrote_is_one_message(
    run: Path, change: Callable[..., Any], values: dict[str, Any], told: str
) -> None:
    """Sealed as if it had been written so: it contradicts itself, or leads out of its folder."""
    rewrite(run / NEWER, change(body_of(run / NEWER), **values))
    with pytest.raises(Damaged, match=re.escape(told)):
        read_manifest(run / NEWER)


def test_a_file_twice_is_no_two(run: Path) -> None:
    body = body_of(run / NEWER)
    rewrite(run / NEWER, body | {"files": body["files"] * 2})
    with pytest.raises(Damaged, match="2 files have 1 names"):
        read_manifest(run / NEWER)


def test_damage_of_weights_is_told_to_who_samples(run: Path) -> None:
    """What is read of a file is checked, and what is not may be damaged."""
    path, runner = run / NEWER, runner_of(plan_of(""))
    size = (path / "00000.safetensors").stat().st_size
    flip(path / "00000.safetensors", size * 8 - 1)  # the EMA lies last
    load_weights(path, "master", runner.buffers["master"], runner.units, runner.coordinates)
    with pytest.raises(Damaged, match=r"00000\.safetensors is not what was written, in block \d+ of ema"):
        load_weights(path, "ema", runner.buffers["ema"], runner.units, runner.coordinates)


def test_states_that_were_put_together_wrong_are_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is whole, but its parts went to other places: a fault of this package, or of this memory."""
    copy = loading._copy
    monkeypatch.setattr(loading, "_copy", lambda values, target, c: copy(values.flip(0), target, c))
    with pytest.raises(Damaged, match=r"master as it was put together has digest [0-9a-f]{16}, not [0-9a-f]{16}"):
        load(run / NEWER, runner_of(plan_of("")))


def resume_with_damage(plan: Plan, run: Path) -> tuple[str, list[str]]:
    runner = runner_of(plan, Mesh(plan))
    found = resume(run, runner)
    assert found is not None and set(whole_states(runner)) == set(SAVED_STATES)
    return found.path.name, [error.path.name for error in found.damaged]


def save_twice(plan: Plan, directory: Path) -> None:
    runner = filled(runner_of(plan, Mesh(plan)))
    for step in (7, 9):
        runner.buffers["counters"][0] = step
        save(directory, runner)


def test_damage_that_one_rank_meets_is_damage_to_all(pool: Pool, tmp_path: Path) -> None:
    """Rank 0 finds its own file whole; all take the older one."""
    pool.run(2, save_twice, plan_of("dp_shard=2"), tmp_path)
    flip(tmp_path / NEWER / "00001.safetensors", 80_000)
    assert pool.run(2, resume_with_damage, plan_of("dp_shard=2"), tmp_path) == [(OLDER, [NEWER])] * 2


def test_the_seal_covers_the_format(run: Path) -> None:
    text = (run / NEWER / MANIFEST).read_text()
    assert text == sealed(FORMAT, text.split("\n")[1])
    (run / NEWER / MANIFEST).write_text(text.replace('"format": 4', '"format": 3', 1))
    with pytest.raises(Damaged, match="not as it was written"):
        read_manifest(run / NEWER)
