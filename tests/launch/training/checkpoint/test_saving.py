"""Saving: written behind training, published whole or not at all; and what stays of earlier checkpoints."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import COUNTED, TINY, assert_same, body_of, filled, plain_states, plan_of, runner_of
from harness import Pool
from safetensors import safe_open
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.launch.storage import places
from cinemesh.launch.storage.places import Location
from cinemesh.launch.training.checkpoint import copies, saving, writing
from cinemesh.launch.training.checkpoint.choosing import VALIDATION_LOSS, Keep, latest
from cinemesh.launch.training.checkpoint.loading import load, load_weights
from cinemesh.launch.training.checkpoint.manifest import MANIFEST, SAVED_STATES, read_manifest
from cinemesh.launch.training.checkpoint.publishing import begin_folder
from cinemesh.launch.training.checkpoint.saving import Saver, save
from cinemesh.launch.training.checkpoint.writing import Written
from cinemesh.model.config import parameters
from cinemesh.model.runner import StepRunner
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh


@pytest.fixture
def saved(tmp_path: Path) -> tuple[StepRunner, Path]:
    runner = filled(runner_of(plan_of("")))
    return runner, save(tmp_path, runner, note={"data": "abc"})


def test_the_manifest_says_what_it_is(saved: tuple[StepRunner, Path]) -> None:
    runner, path = saved
    found = read_manifest(path)
    assert [found.step, found.updates] == COUNTED and found.note == {"data": "abc"}
    assert found.code["torch"] == torch.__version__ and len(str(found.code["commit"])) in (4, 40)
    assert found.model["layers"] == TINY.layers and Plan.from_dict(found.plan) == runner.plan
    assert path.name == "step-00000007"


def test_every_state_lies_under_its_name_in_safetensors(saved: tuple[StepRunner, Path]) -> None:
    """Read by another package. States that save and load exchange alike show here alone."""
    _, path = saved
    (part,) = body_of(path)["files"]
    with safe_open(path / part["name"], framework="pt") as file:
        assert set(file.keys()) == set(SAVED_STATES)
    assert_same(plain_states(path))


def test_the_states_are_those_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on before a byte is written; and nothing is there until all is."""
    runner, go = filled(runner_of(plan_of(""))), threading.Event()

    def late(*given: Any) -> Written:
        assert go.wait(60)
        return writing.write_part(*given)

    monkeypatch.setattr(saving, "write_part", late)
    saver = Saver(tmp_path, runner, Keep())
    saver.begin({})
    for state in SAVED_STATES:
        runner.buffers[state].fill_(torch.nan)
    runner.buffers["counters"].fill_(99)
    assert not saver.written and latest(tmp_path) is None
    go.set()
    path = saver.end()
    saver.close()
    assert_same(plain_states(tmp_path / path.name))
    assert read_manifest(path).step == COUNTED[0] and saver.written


def test_memory_for_the_copies_is_asked_for_once(tmp_path: Path) -> None:
    """Pinning it takes seconds on a GPU's host."""
    runner = filled(runner_of(plan_of("")))
    saver, seen = Saver(tmp_path, runner, Keep()), set[tuple[int, ...]]()
    for step in (1, 2):
        runner.buffers["counters"].fill_(step)
        saver.begin({})
        saver.end()
        seen.add(tuple(copy.data_ptr() for copy in saver.copies.states.values()))
    saver.close()
    assert len(seen) == 1
    copied = sum(copy.numel() * copy.element_size() for copy in saver.copies.states.values())
    assert copied == copies.copy_bytes(runner.units)


def test_on_a_gpu_the_copies_are_pinned_once_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written before a copy has ended is torn; so many bytes are pinned, not the next power of two."""
    runner, asked = filled(runner_of(plan_of(""))), list[object]()
    stream = SimpleNamespace(synchronize=lambda: asked.append("waited"))
    monkeypatch.setattr(copies, "pin", lambda memory, *_: asked.append(memory.numel()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(runner.executor, "device", "cuda")
    saver = Saver(tmp_path, runner, Keep())
    for _ in range(2):
        saver.begin({})
        saver.end()
    saver.close()
    path = tmp_path / "step-00000007"
    assert asked == [copies.copy_bytes(runner.units), "waited", "waited"]
    assert_same(plain_states(path))


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Keep(2), [50, 60]),
        (Keep(1), [60]),
        (Keep(1, every=20), [20, 40, 60]),
        (Keep(1, best=True), [30, 60]),
        (Keep(2, every=40, best=True), [30, 40, 50, 60]),
    ],
)
def test_what_stays(tmp_path: Path, keep: Keep, stay: list[int]) -> None:
    """The newest, every so many steps, the best of those that were validated."""
    runner = runner_of(plan_of(""))
    losses = {10: 3.0, 30: 1.0, 40: 2.0}
    for step in range(10, 70, 10):
        runner.buffers["counters"][0] = step
        saver = Saver(tmp_path, runner, keep)
        saver.begin({VALIDATION_LOSS: losses[step]} if step in losses else {})
        saver.end()
        saver.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in stay]


def test_later_ones_of_a_run_that_went_back_push_nothing_out(tmp_path: Path) -> None:
    """They may be damaged, which is why it went back: what it writes now must stay."""
    runner = runner_of(plan_of(""))
    for step in (100_000_000, 20, 9, 30):
        runner.buffers["counters"][0] = step
        save(tmp_path, runner, keep=1)
        assert (tmp_path / f"step-{step:08d}").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"step-100000000", "step-00000030"}
    assert latest(tmp_path) == tmp_path / "step-100000000"


def test_the_same_step_again_replaces(saved: tuple[StepRunner, Path]) -> None:
    runner, path = saved
    runner.buffers["ema"].fill_(5)
    assert save(path.parent, runner) == path
    load_weights(path, "ema", runner.buffers["master"], runner.units, runner.coordinates)
    assert runner.buffers["master"].max() == 5
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_broken_saves_are_cleared_away(saved: tuple[StepRunner, Path]) -> None:
    runner, path = saved
    left = path.parent / "step-00000099"
    begin_folder(left)
    (left / "00000.safetensors").write_bytes(b"half")
    save(path.parent, runner)
    assert not left.exists()


# -- what fails -------------------------------------------------------------------------------------------------------


def fail_on_write(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[Location]:
    """The first writes to a file end half way, and raise this."""
    write, done = writing.write_file, list[Location]()

    def failing(file: Location, chunks: Sequence[memoryview]) -> None:
        if len(done) < times:
            done.append(file)
            write(file, [chunk[: len(chunk) // 2] for chunk in chunks])
            raise OSError(number, os.strerror(number))
        write(file, chunks)

    monkeypatch.setattr(writing, "write_file", failing)
    monkeypatch.setattr(writing, "RETRY_AFTER_S", 0.0)
    return done


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.ENOENT, "a logging.directory of its own"),
        (errno.EROFS, "permissions"),
        (errno.EIO, "its file system"),
    ],
)
def test_the_remedy_is_for_what_went_wrong(
    saved: tuple[StepRunner, Path], monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """A file that another run removed is no lack of space. What was there stays."""
    runner, path = saved
    fail_on_write(monkeypatch, number, 99)
    runner.buffers["counters"][0] = 8
    with pytest.raises(CinemeshError) as caught:
        save(path.parent, runner)
    assert remedy in caught.value.remedy and os.strerror(number) in caught.value.problem
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_write_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shared file system refuses for a moment is no lost checkpoint, and no torn one."""
    done = fail_on_write(monkeypatch, errno.EIO, 1)
    assert_same(plain_states(save(tmp_path, filled(runner_of(plan_of(""))))))
    assert len(done) == 1


@pytest.mark.parametrize(
    "step", ["write_file", "link", "fsync"], ids=["the manifest is not written", "nor gets its name", "nor synced"]
)
def test_a_publication_that_fails_leaves_the_one_before(
    saved: tuple[StepRunner, Path], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    runner, path = saved
    runner.buffers["counters"][0] = 8
    saver = Saver(path.parent, runner, Keep())
    saver.begin({})
    while not saver.written:
        pass

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(places if step == "write_file" else os, step, full)
        with pytest.raises(CinemeshError, match="No space left on device"):
            saver.end()
    saver.close()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    load(path, runner)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float64", 32), ("bf16", 16)])
def test_no_room_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, bytes_each: int
) -> None:
    elements = sum(row.elements for row in parameters(TINY))
    monkeypatch.setattr(places, "free_bytes", lambda path: elements * bytes_each - 1)
    with pytest.raises(CinemeshError) as error:
        save(tmp_path, runner_of(plan_of("", dtype)))
    assert f"{elements * bytes_each:,}" in str(error.value) and f"{elements * bytes_each - 1:,}" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(places, "free_bytes", lambda path: elements * bytes_each)
    assert save(tmp_path, runner_of(plan_of("", dtype))).is_dir(), "just enough"


def save_with_one_full_disk(plan: Plan, directory: Path) -> tuple[str, list[str]]:
    """The message of a failed save on this rank, and what the next one left."""
    mesh = Mesh(plan)
    runner = filled(runner_of(plan, mesh))
    save(directory, runner)
    runner.buffers["counters"][0] += 1
    whole: Callable[..., Any] = writing.write_file

    def full_disk(file: Location, chunks: Sequence[memoryview]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if mesh.rank == 1:
        writing.write_file, writing.RETRY_AFTER_S = full_disk, 0.0
    try:
        with pytest.raises(CinemeshError) as failed:
            save(directory, runner)
    finally:
        writing.write_file = whole
    left = [path.name for path in directory.iterdir()]
    return str(failed.value), left


def test_one_failed_rank_fails_all(pool: Pool, tmp_path: Path) -> None:
    """No rank waits for ever, none believes in a checkpoint, and what is left is the one before."""
    for failed, _ in pool.run(2, save_with_one_full_disk, plan_of("dp_shard=2"), tmp_path):
        assert "rank 1" in failed and "No space left on device" in failed and "step-00000008" in failed
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_a_folder_that_went_away_is_told(saved: tuple[StepRunner, Path]) -> None:
    """While it was written."""
    runner, path = saved
    saver = Saver(path.parent, runner, Keep())
    saver.begin({})
    shutil.rmtree(path.parent)
    with pytest.raises(CinemeshError, match=r"cannot write checkpoint .*somebody removed it meanwhile"):
        saver.end()
    saver.close()
    assert not (path / MANIFEST).exists()


def test_replicas_share_the_writing(pool: Pool, tmp_path: Path) -> None:
    """Each of two writes half of what they both hold."""
    (path, _) = pool.run(2, save_under, plan_of("dp_replicate=2"), tmp_path)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    total = sum(tensor.numel() for tensors in plain_states(path).values() for tensor in tensors.values()) * 8
    assert len(sizes) == 2 and max(sizes) < 0.6 * total
    assert_same(plain_states(path))


def save_under(plan: Plan, directory: Path) -> Path:
    return save(directory, filled(runner_of(plan, Mesh(plan))))


def test_values_of_the_padding_are_written_as_they_are(tmp_path: Path) -> None:
    """Zero: a compressed or compared file has nothing that no parameter has."""
    runner = filled(runner_of(plan_of("")))
    (part,) = body_of(path := save(tmp_path, runner))["files"]
    with safe_open(path / part["name"], framework="pt") as file:
        got: Tensor = file.get_tensor("ema")
    assert torch.equal(got, runner.buffers["ema"].view(-1))
