"""Copies in memory: what is agreed on, handed on and loaded, and what is not believed.

Servers are folders: each rank of a job is told which is its server's.
"""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import COUNTED, plan_of, runner_of
from elastic_job import Fault, run_job
from harness import Pool
from hypothesis import given
from hypothesis import strategies as st
from planted_faults import check_kills, recipe_in_memory

from cinemesh.errors import CinemeshError
from cinemesh.launch.storage import places
from cinemesh.launch.training.checkpoint.manifest import SAVED_STATES
from cinemesh.launch.training.checkpoint.saving import save
from cinemesh.launch.training.in_memory import slots
from cinemesh.launch.training.in_memory.agreeing import HeldCopy, Shard, steps_agreed
from cinemesh.launch.training.in_memory.recovery import CopiesInMemory, Recovered
from cinemesh.launch.training.needs import check_training_memory
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.setting import Setting
from cinemesh.model.runner import StepRunner
from cinemesh.model.weights import fill_shard, probe_values
from cinemesh.parallel.runtime.mesh import Mesh

TEXT = "dp_shard=2,dp_replicate=2"
PER_SERVER = 2
STEPS = (7, 9)

# -- what is agreed on ------------------------------------------------------------------------------------------------

SHARDS: list[Shard] = [(0, 0, 0), (0, 0, 1)] * 2  # of four ranks


def offer(by: int, step: int, shard: int | None = None, said: str = "good", note: str = "n") -> HeldCopy:
    held = SHARDS[by if shard is None else shard]
    return HeldCopy(by, f"{by:05d}-{step % 2}.bin", step, step, held, (said, *map(str, held)), note, 0)


def test_the_newest_step_that_every_shard_has_a_holder_of() -> None:
    """Ranks 2 and 3 died while they copied step 9; rank 1 had not begun to."""
    offers = [offer(0, 9), offer(0, 7), offer(1, 7), offer(1, 5), offer(3, 7)]
    (newest,), refused = steps_agreed(offers, SHARDS)
    assert newest.step == 7 and newest.updates == 7
    assert [(one.source, one.ranks) for one in newest.handed_on] == [(0, (0, 2)), (1, (1,)), (3, (3,))]
    assert refused == ["step 9: 1 of 2 shards have no holder", "step 5: 1 of 2 shards have no holder"]


def test_of_two_that_differ_none_is_believed_and_of_three_the_two() -> None:
    shards = SHARDS[:2] * 3
    two = [offer(0, 7), offer(1, 7), offer(2, 7, said="bad"), offer(3, 7)]
    assert steps_agreed(two, shards) == ([], ["step 7: rank 0 and rank 2 hold shard (0, 0, 0), and differ"])
    third = replace(offer(0, 7), by=4, name="00004-1.bin")
    (agreed,), _ = steps_agreed([*two, third], shards)
    assert agreed.digests[(0, 0, 0)] == ("good", "0", "0", "0")
    assert {(one.source, one.ranks) for one in agreed.handed_on} == {
        (0, (0, 2)), (4, (4,)), (1, (1, 5)), (3, (3,)),
    }  # fmt: skip


def test_shards_of_two_runs_make_no_state() -> None:
    found = steps_agreed([offer(0, 7), offer(1, 7, note="other")], SHARDS)
    assert found == ([], ["step 7: the shards are not of one run"])


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3))
def test_what_is_agreed_is_held_by_a_majority_of_every_shard(seed: int, shards: int, replicas: int) -> None:
    """Any offers: who gives a shard has it and said so; every rank gets its own, once; every step is told of."""
    draw = random.Random(seed)
    shard_of: list[Shard] = [(0, 0, number) for number in range(shards)] * replicas
    offers = [
        HeldCopy(by, f"{by}-{step}", step, step, draw.choice(shard_of), (draw.choice("aab"),), draw.choice("nnnm"), 0)
        for by in range(len(shard_of))
        for step in draw.sample(range(1, 5), 2)
    ]
    agreed, refused = steps_agreed(offers, shard_of)
    assert {one.step for one in agreed} | {int(line.split()[1].rstrip(":")) for line in refused} == {
        one.step for one in offers
    }
    assert [one.step for one in agreed] == sorted((one.step for one in agreed), reverse=True)
    for found in agreed:
        given_to = [rank for one in found.handed_on for rank in one.ranks]
        assert sorted(given_to) == list(range(len(shard_of)))
        notes: set[str] = set()
        for one in found.handed_on:
            (source,) = (o for o in offers if (o.by, o.name, o.step) == (one.source, one.name, found.step))
            notes.add(source.note)
            same = [o for o in offers if (o.step, o.shard) == (found.step, source.shard)]
            assert 2 * sum((o.digests, o.note) == (source.digests, source.note) for o in same) > len(same)
            assert all(shard_of[rank] == source.shard for rank in one.ranks)
        assert len(notes) == 1


# -- on ranks ---------------------------------------------------------------------------------------------------------


def put(runner: StepRunner, step: int) -> None:
    """States that tell the step, the state and the element."""
    for number, state in enumerate(SAVED_STATES):
        fill_shard(runner.buffers[state], runner.units, runner.coordinates, probe_values(10 * step + number))
    runner.buffers["counters"].copy_(torch.tensor([step, step - 1]))


@contextmanager
def on_a_server(folder: Path, text: str) -> Iterator[CopiesInMemory]:
    """This rank's copies, as if two ranks were on each machine."""
    plan, rank = plan_of(text), dist.get_rank()
    local = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % PER_SERVER, "LOCAL_WORLD_SIZE": PER_SERVER}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in local.items():
            patched.setenv(name, str(value))
        runner, memory = runner_of(plan, Mesh(plan)), folder / f"server{rank // PER_SERVER}"
        yield CopiesInMemory(memory, folder / "checkpoints", runner, job_store())


def copy(copies: CopiesInMemory, steps: Sequence[int]) -> None:
    for step in steps:
        put(copies.runner, step)
        copies.take({"of": step})
        assert copies.slots is not None
        copies.slots.finish()


def job_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def copy_steps(folder: Path, steps: Sequence[int], text: str = TEXT) -> None:
    """A life of a job that ends without a word after the last of ``steps``."""
    with on_a_server(folder, text) as copies:
        assert copies.recover() == (None, [])
        copy(copies, steps)


def go_on(folder: Path, text: str = TEXT) -> tuple[Recovered | None, list[str], bool, list[int]]:
    """The next life: what it found; whether every state is that step's, and the counters."""
    with on_a_server(folder, text) as copies:
        found, said = copies.recover()
    runner, good = copies.runner, False
    if found is not None:
        other = runner_of(runner.plan, runner.mesh)
        put(other, found.step)
        good = all(torch.equal(runner.buffers[state], other.buffers[state]) for state in SAVED_STATES)
    return found, said, good, runner.buffers["counters"].tolist()


def check_gone_on(answers: list[Any], step: int) -> list[str]:
    """All ranks, bitwise; what was said."""
    for found, said, good, counters in answers:
        assert found == Recovered(step, {"of": step}), said
        assert good and counters == [step, step - 1]
    assert len({tuple(said) for _, said, *_ in answers}) == 1
    return answers[0][1]


def copies_of(folder: Path, rank: int) -> dict[int, Path]:
    """Headers by step."""
    found = folder.glob(f"server*/cinemesh-*/*/{rank:05d}-?.json")
    return {json.loads(path.read_text())["step"]: path for path in found}


@pytest.fixture
def life(pool: Pool, tmp_path: Path) -> Path:
    pool.run(4, copy_steps, tmp_path, STEPS)
    return tmp_path


def test_a_server_that_was_replaced_gets_its_shards_from_the_other(pool: Pool, life: Path) -> None:
    """And the step after has its holders again."""
    shutil.rmtree(life / "server1")
    assert check_gone_on(pool.run(4, go_on, life), 9) == []


def test_a_dead_process_needs_no_replica(pool: Pool, tmp_path: Path) -> None:
    """All servers are there: each rank has its own."""
    text = "dp_shard=2,tp=2"
    pool.run(4, copy_steps, tmp_path, STEPS, text)
    assert check_gone_on(pool.run(4, go_on, tmp_path, text), 9) == []
    shutil.rmtree(tmp_path / "server0")
    assert {found for found, *_ in pool.run(4, go_on, tmp_path, text)} == {None}, "nobody else has its shards"


def test_servers_that_take_other_numbers(pool: Pool, life: Path) -> None:
    """Where two meet again in the other order, each has the copies of the ranks of the other."""
    first, second = life / "server0", life / "server1"
    for header in life.glob("server*/cinemesh-*/*/*.json"):  # of another shard than that of the rank of its number
        rank = int(header.name[:5])
        flipped = rank ^ 1
        for kind in (".json", ".bin"):
            path = header.with_suffix(kind)
            path.rename(path.with_name(f"x{flipped:05d}{path.name[5:]}"))
    for path in life.glob("server*/cinemesh-*/*/x*"):
        path.rename(path.with_name(path.name[1:]))
    first.rename(life / "other")
    second.rename(first)
    (life / "other").rename(second)
    assert check_gone_on(pool.run(4, go_on, life), 9) == []


def test_one_that_died_while_it_copied_leaves_the_step_before(pool: Pool, life: Path) -> None:
    for rank in (1, 3):
        copies_of(life, rank)[9].unlink()
    said = check_gone_on(pool.run(4, go_on, life), 7)
    assert said == ["step 9: 1 of 2 shards have no holder, in the servers' memory"]


def test_memory_that_changed_is_not_loaded(pool: Pool, life: Path) -> None:
    """One bit, of the only holder that is asked: the digest of what it hands on differs; the step before is taken."""
    shutil.rmtree(life / "server1")
    path = copies_of(life, 1)[9].with_suffix(".bin")
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    said = check_gone_on(pool.run(4, go_on, life), 7)
    assert said == ["step 9, in the servers' memory: rank 1: ema is not what was copied"]


def test_holders_that_differ_are_not_believed(pool: Pool, life: Path) -> None:
    """A device that erred in silence copied what it has, with its digest: only the second holder tells."""
    path = copies_of(life, 3)[9]
    header = json.loads(path.read_text())
    header["digests"][2] = "0" * 64
    path.write_text(json.dumps(header))
    said = check_gone_on(pool.run(4, go_on, life), 7)
    assert said == ["step 9: rank 1 and rank 3 hold shard (0, 0, 1), and differ, in the servers' memory"]


def test_another_plan_goes_by_storage(pool: Pool, life: Path) -> None:
    answers = pool.run(4, go_on, life, "tp=2,dp_replicate=2")
    assert {found for found, *_ in answers} == {None}
    assert not [*life.glob("server*/cinemesh-*/*/*.json")]


# -- one rank ---------------------------------------------------------------------------------------------------------


def alone(folder: Path) -> tuple[CopiesInMemory, StepRunner]:
    runner = runner_of(plan_of(""))
    return CopiesInMemory(folder / "memory", folder / "checkpoints", runner, None), runner


def copied(folder: Path, *steps: int) -> CopiesInMemory:
    copies, _ = alone(folder)
    copies.recover()
    copy(copies, steps)
    return copies


def found_in(folder: Path) -> Recovered | None:
    copies, _ = alone(folder)
    return copies.recover()[0]


def stored(folder: Path, step: int) -> Path:
    _, runner = alone(folder)
    put(runner, step)
    path = save(folder / "checkpoints", runner, note={})
    assert isinstance(path, Path)
    return path


def test_the_newer_of_memory_and_storage_is_taken(tmp_path: Path) -> None:
    copied(tmp_path, 5, 6, 8)
    assert found_in(tmp_path) == Recovered(8, {"of": 8})
    stored(tmp_path, 7)
    assert found_in(tmp_path) == Recovered(8, {"of": 8})
    stored(tmp_path, 8)
    assert found_in(tmp_path) is None, "storage has it"


def test_who_moves_checkpoints_away_begins_where_they_say(tmp_path: Path) -> None:
    """A copy that was taken when there was a checkpoint is not gone on from when that is no more."""
    path = stored(tmp_path, 4)
    copies = copied(tmp_path)
    assert copies.since == 4
    copy(copies, [6])
    assert found_in(tmp_path) == Recovered(6, {"of": 6})
    (path / "00000.safetensors").unlink()
    assert found_in(tmp_path) == Recovered(6, {"of": 6}), "damaged, and still there"
    shutil.rmtree(path)
    assert found_in(tmp_path) is None


def test_a_run_that_was_begun_anew_has_no_copies(tmp_path: Path) -> None:
    copied(tmp_path, 5)
    shutil.rmtree(tmp_path / "checkpoints")
    assert found_in(tmp_path) is None


def test_a_pattern_of_a_shell_finds_checkpoints_alone(tmp_path: Path) -> None:
    """``cinemesh average run/checkpoints/*`` takes what it finds for checkpoints."""
    copied(tmp_path, 5)
    stored(tmp_path, 6)
    assert [Path(path).name for path in glob.glob(f"{tmp_path}/checkpoints/*")] == ["step-00000006"]


def test_a_run_that_goes_back_forgets(tmp_path: Path) -> None:
    copied(tmp_path, 5).forget()
    assert found_in(tmp_path) is None


def test_a_run_that_has_ended_gives_its_memory_back(tmp_path: Path) -> None:
    copied(tmp_path, 5, 6).close()
    assert not [path for path in (tmp_path / "memory").rglob("*") if path.is_file()]


def test_what_a_job_left_behind_goes_after_an_hour_unless_somebody_is_there(tmp_path: Path) -> None:
    """Not the copies of a job that is alive, nor those of one that may yet be started again."""
    kept = copied(tmp_path / "alive", 5)
    folder = kept.folder.parent.parent
    others = {name: kept.folder.with_name(name * 32) for name in "abc"}
    for name, other in others.items():
        other.mkdir()
        (other / "00000-0.bin").write_bytes(b"x")
        old = time.time() - (slots.STALE_S + 60) * (name != "b")
        os.utime(other / "00000-0.bin", (old, old))
        os.utime(other, (old, old))
    held = slots._mapped(others["c"] / "00000-0.bin", 8)
    old = time.time() - slots.STALE_S - 60
    os.utime(others["c"] / "00000-0.bin", (old, old))
    slots.remove_stale(slots.run_folder(folder, "d" * 32))
    assert {name for name, other in others.items() if other.exists()} == {"b", "c"}
    del held
    slots.remove_stale(slots.run_folder(folder, "d" * 32))
    assert {name for name, other in others.items() if other.exists()} == {"b"}


def test_too_little_memory_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slots.os, "posix_fallocate", full)
    copies, _ = alone(tmp_path)
    with pytest.raises(CinemeshError, match=r"takes [\d,]+ bytes of .*No space left on device; give it more"):
        copies.recover()
    (tmp_path / "file").write_text("")
    with pytest.raises(CinemeshError, match=r"logging\.memory_folder: cannot make"):
        CopiesInMemory(tmp_path / "file", tmp_path / "checkpoints", copies.runner, None)


def test_a_file_system_that_can_never_hold_them_is_told_before_anything_is_made(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the videos were decoded; and not for copies of the life before, which are written over."""
    values = recipe_in_memory(clips, tmp_path, 2, tmp_path / "absent" / "memory")
    values["plan"] = {"dtype": "float32"}
    setting = Setting.of(check_config(values, "recipe"))
    check_training_memory(setting)
    sizes = shutil.disk_usage(tmp_path)._replace(total=10**6)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: sizes)
    with pytest.raises(CinemeshError, match=r"memory_every needs [\d,]+ bytes of .*, which has 1,000,000 in all"):
        check_training_memory(setting)


def test_a_copy_that_cannot_be_written_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full file system takes a copy away, not a run; the copy before is still there."""
    copies = copied(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    put(copies.runner, 6)
    with monkeypatch.context() as patched:
        patched.setattr(slots, "atomic_file", full)
        copies.take({"of": 6})
        assert copies.slots is not None
        copies.slots.behind.submit(lambda: None).result()
    assert found_in(tmp_path) == Recovered(5, {"of": 5})
    put(copies.runner, 7)
    copies.take({"of": 7})
    copies.slots.finish()
    warning = "WARNING: rank 0 has no copy of the states in memory: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == warning
    assert found_in(tmp_path) == Recovered(7, {"of": 7})
    with monkeypatch.context() as patched:
        patched.setattr(slots, "atomic_file", full)
        copies.take({"of": 8})
        copies.close()  # nor does the last one end a run that is done
    assert capsys.readouterr().err == warning


def test_what_others_made_in_this_users_name_is_refused(tmp_path: Path) -> None:
    """``/dev/shm`` is anybody's: states would be read from, and written for, whoever came first."""
    own, run = tmp_path / f"cinemesh-{os.getuid()}", "a" * 32
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CinemeshError, match="is not this user's alone; have it removed"):
        slots.run_folder(tmp_path, run)
    own.unlink()
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(CinemeshError, match="is not this user's alone"):
        slots.run_folder(tmp_path, run)
    own.rmdir()
    assert slots.run_folder(tmp_path, run).stat().st_mode & 0o777 == own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("folder", ["s3://bucket/run", "", "~/copies", "shm"])
def test_a_folder_of_a_server_is_an_absolute_path(clips: Path, tmp_path: Path, folder: str) -> None:
    """Else copies would lie in a folder ``s3:``, or in one of each directory that a job is started from."""
    values = recipe_in_memory(clips, tmp_path, 2, tmp_path)
    values["logging"]["memory_folder"] = folder
    with pytest.raises(CinemeshError, match=r"logging\.memory_folder is .*, no absolute path"):
        check_config(values, "recipe")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 5}', '{"step": "5"}', "\x00", "{" * 5000])
def test_a_header_that_is_none_is_no_copy(tmp_path: Path, text: str) -> None:
    copies = copied(tmp_path, 5)
    (path,) = copies.folder.glob("*.json")
    path.write_text(text)
    assert found_in(tmp_path) is None
    assert COUNTED  # the module's runners are the checkpoints' own


# -- a job ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_that_loses_ranks_and_their_memory_goes_on_from_the_others(clips: Path, tmp_path: Path) -> None:
    """Without a checkpoint in storage: killed with and without what its server held, and the bits are the same."""
    whole, killed = (
        recipe_in_memory(clips, tmp_path / name, 16, tmp_path / name / "memory") for name in ("whole", "killed")
    )
    whole["logging"]["memory_every"] = 0
    done = run_job(tmp_path / "whole", whole, [])
    assert done.code == 0, done.told
    faults = [
        Fault(1, "lose", "record", 4, "attention"),
        Fault(0, "lose", "record", 3, "adamw"),
        Fault(1, "kill", "loader", 3),
        Fault(0, "kill", "record", 2, "all_reduce"),
    ]
    done = run_job(tmp_path / "killed", killed, faults, torchrun=True)
    lost = check_kills(done, killed, whole)
    assert lost["fired"] == len(faults) and max(lost["steps_lost"]) <= 2, lost
    said = [line for _, line in done.out if "the servers' memory" in line]
    assert len(said) == len(faults), done.told
    assert not [path for path in (tmp_path / "killed/memory").rglob("*") if path.is_file()]
