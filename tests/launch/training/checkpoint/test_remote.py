"""Checkpoints on an object store: the same bytes, the same checks, published by one conditional PUT."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from checkpoints import COUNTED, TINY, assert_same, filled, held_under, plan_of, runner_of, whole_states, write_under
from damages import KINDS, NEWER, OLDER, damages, knock, write_runs
from harness import Pool
from s3 import BUCKET, Server, bucket
from s3 import s3 as s3
from s3 import s3_server as s3_server

from cinemesh.errors import CinemeshError
from cinemesh.launch.storage.places import Location, children, put_file
from cinemesh.launch.storage.remote import RemotePath
from cinemesh.launch.training.checkpoint import publishing, writing
from cinemesh.launch.training.checkpoint.alone import write_alone
from cinemesh.launch.training.checkpoint.choosing import Keep, latest, published
from cinemesh.launch.training.checkpoint.layout import Layout
from cinemesh.launch.training.checkpoint.loading import load, read_parameter, read_states, resume
from cinemesh.launch.training.checkpoint.manifest import MANIFEST, Damaged, read_manifest
from cinemesh.launch.training.checkpoint.saving import Saver, save
from cinemesh.model.step import unit_layout
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh, coordinates


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "RETRY_AFTER_S", 0.0)


def uploaded(folder: Path) -> RemotePath:
    """A folder's copy in an empty bucket."""
    files = fsspec.filesystem("s3")
    there = bucket(folder.name)
    there.remove_all()
    files.put(f"{folder}/", f"{BUCKET}/{folder.name}/", recursive=True)
    return there


def names(folder: Location) -> list[str]:
    return [child.name for child in children(folder)]


def test_saved_and_gone_on_from(s3: Server, tmp_path: Path) -> None:
    """The manifest is the last object that is written; by path there are the same bytes."""
    runner = filled(runner_of(plan_of("")))
    there, here = save(bucket(), runner), save(tmp_path, runner)
    put = [one.path.rpartition("/")[2] for one in s3.asked if one.method in ("PUT", "POST")]
    assert put == [publishing.UNFINISHED, "00000.safetensors", MANIFEST]
    files = fsspec.filesystem("s3")
    for name in ("00000.safetensors", MANIFEST):
        assert files.cat_file(f"{there}/{name}") == (here / name).read_bytes()
    other = runner_of(plan_of(""))
    found = resume(bucket(), other)
    assert found is not None and found.path == there == latest(bucket()) and not found.damaged
    assert_same(whole_states(other))
    assert other.buffers["counters"].tolist() == COUNTED


def test_a_rank_reads_what_it_needs_alone(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that hold its part: of one rank in eight about an eighth of the bytes, in ranges."""
    monkeypatch.setattr(writing, "BLOCK_ELEMENTS", 512)
    write_under(plan_of("tp=2,dp_shard=2", "float32"), tmp_path / "step-00000007")
    path, plan = uploaded(tmp_path) / "step-00000007", plan_of("dp_shard=8", "float32")
    found, units = read_manifest(path), unit_layout(TINY, plan)
    s3.asked.clear()
    flats = {state: torch.empty(units.flat_elements) for state in found.states}
    read_states(path, found, Layout.of(units), coordinates(plan, 3), flats)
    for state, want in held_under(plan, 3).items():
        assert torch.equal(flats[state], want)
    ranges = [one.range.removeprefix("bytes=").split("-") for one in s3.asked if one.method == "GET" and one.range]
    read = sum(int(last) - int(first) + 1 for first, last in ranges)
    assert len(ranges) > 8 and 1 / 8 < read / sum(file.size_bytes for file in found.files) < 1 / 4
    got = read_parameter(path, found, "ema", "position.t")
    assert got.shape == found.layout.shapes["position.t"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    write_runs(directory)
    return directory


@pytest.mark.parametrize("kind", range(KINDS))
def test_no_damage_is_loaded(s3: Server, runs: Path, tmp_path: Path, kind: int) -> None:
    """One of each kind, on the store."""
    run = Path(shutil.copytree(runs / "run", tmp_path / "run"))
    listed = damages(random.Random(kind), run, runs / "other")
    assert knock(*listed[kind], run, runner_of(plan_of("")), uploaded) is None


def test_a_server_that_is_away_is_no_damage(s3: Server, runs: Path) -> None:
    """Going on from an older checkpoint, or from step 0, would throw away what is there."""
    there = uploaded(runs / "run")
    s3.fails = lambda one: one.path.endswith(f"{NEWER}/00000.safetensors") and one.method == "GET"
    with pytest.raises(CinemeshError, match=r"cannot read .*that the server answers") as told:
        resume(there, runner_of(plan_of("")))
    assert not isinstance(told.value, Damaged)


@pytest.mark.parametrize("what", ["00000.safetensors", MANIFEST, publishing.UNFINISHED])
def test_a_save_that_fails_leaves_the_ones_before(s3: Server, runs: Path, what: str) -> None:
    there, runner = uploaded(runs / "run"), filled(runner_of(plan_of("")))
    runner.buffers["counters"][0] = 11
    s3.fails = lambda one: one.path.endswith(f"11/{what}") and one.method in ("PUT", "POST")
    with pytest.raises(CinemeshError, match=f"cannot write s3://.*{what}"):
        save(there, runner)
    s3.fails = lambda _: False
    assert names(there) == [OLDER, NEWER]
    save(there, runner)
    assert names(there) == [NEWER, "step-00000011"]


def test_what_was_broken_off_is_none_and_is_cleared_away(s3: Server, runs: Path) -> None:
    """A mark, and no manifest; of a removal too. A manifest that somebody deleted is damage, and nothing is removed."""
    there, runner = uploaded(runs / "run"), filled(runner_of(plan_of("")))
    publishing.begin_folder(there / "step-00000010")
    put_file(there / "step-00000010" / "00000.safetensors", b"half")
    (there / NEWER / MANIFEST).unlink()
    assert published(there) == [there / NEWER, there / OLDER]
    found = resume(there, runner)
    assert found is not None and found.path.name == OLDER and [one.path.name for one in found.damaged] == [NEWER]
    runner.buffers["counters"][0] = 8
    save(there, runner)
    assert names(there) == [OLDER, "step-00000008", NEWER]


def test_what_stays(s3: Server) -> None:
    runner = runner_of(plan_of(""))
    for step in range(10, 50, 10):
        runner.buffers["counters"][0] = step
        saver = Saver(bucket(), runner, Keep(1, every=20))
        saver.begin({})
        saver.end()
        saver.close()
    assert names(bucket()) == ["step-00000020", "step-00000040"]


def test_another_manifest_is_not_written_over(s3: Server) -> None:
    """Two jobs that do not know of one another: the second one's PUT has a condition."""
    runner = filled(runner_of(plan_of("")))
    saver = Saver(bucket(), runner, Keep())
    saver.begin({})
    put_file(bucket() / "step-00000007" / MANIFEST, b"another's")
    with pytest.raises(CinemeshError, match=r"has got a cinemesh\.json meanwhile; another run writes there"):
        saver.end()
    saver.close()


def write_one(folder: Location, fail: Callable[[], None]) -> None:
    def fill(layout: Layout, at: dict[str, int], flats: dict[str, torch.Tensor]) -> None:
        fail()

    write_alone(folder, TINY, {"ema": "float32"}, fill, step=1, updates=1, note={})


def test_one_process_alone(s3: Server) -> None:
    def fails() -> None:
        raise CinemeshError("no")

    with pytest.raises(CinemeshError, match="no"):
        write_one(bucket("mean"), fails)
    assert children(bucket("mean")) == []
    write_one(bucket("mean"), lambda: None)
    assert read_manifest(bucket("mean")).step == 1
    with pytest.raises(CinemeshError, match="s3://runs/mean exists; name a new folder"):
        write_one(bucket("mean"), lambda: None)


def save_and_read(plan: Plan, environment: dict[str, str]) -> None:
    import os

    os.environ |= environment
    mesh = Mesh(plan)
    save(bucket(), filled(runner_of(plan, mesh)), files="server")
    runner = runner_of(plan, mesh)
    load(bucket() / "step-00000007", runner)
    if mesh.rank == 0:
        assert names(bucket() / "step-00000007") == ["00000.safetensors", MANIFEST]
    assert_same(whole_states(runner))


def test_ranks_write_one_file_together(s3: Server, pool: Pool) -> None:
    pool.run(4, save_and_read, plan_of("tp=2,dp_replicate=2"), s3.environment)
