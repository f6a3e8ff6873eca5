"""The ranks of a job meet in a round of their own, and a difference between them is one error that names it."""

from __future__ import annotations

import copy
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from training import in_two_buckets, recipe

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster import alike, meeting
from cinemesh.launch.cluster.alike import PER_RANK, program_digest, software_alike
from cinemesh.launch.cluster.meeting import Meeting, agree, meet, token_of
from cinemesh.launch.proof.verify import small_case
from cinemesh.launch.training.differences import recipe_facts
from cinemesh.launch.training.recipe import check_config
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.program import Program

RANKS = 3


def told(everyones: list[dict[str, str]]) -> list[str]:
    """What each rank hears; nothing where all agree."""
    store = HashStore()

    def hears(rank: int) -> str:
        try:
            agree(Meeting(store, "a", rank, len(everyones)), "recipe", everyones[rank])
        except CinemeshError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(everyones)) as ranks:
        return list(ranks.map(hears, range(len(everyones))))


def planted(clips: Path, tmp_path: Path) -> dict[str, dict[str, str]]:
    """Facts of a run with one thing another, by its key: 24 of its recipe, the others of software and data."""
    config = check_config(in_two_buckets(recipe(clips, tmp_path)) | {"cluster": "local-cpu"}, "test")
    usual = recipe_facts(config) | software_alike() | {"program of 1x4x4": "a", "latent cache": "b"}
    keys = [key for key in usual if not key.startswith("plan.")]
    recipe_keys = [key for key in keys if "." in key or key in ("seed", "caption_dropout")][::2][:24]
    others = [key for key in keys if key.split()[0] in ("package", "python", "code", "program", "latent")]
    return {"": usual} | {key: usual | {key: "another"} for key in (*recipe_keys, *others[-7:], "variable NCCL_ALGO")}


def test_every_difference_is_named_on_every_rank(clips: Path, tmp_path: Path) -> None:
    """Rank 2 alone has it: key, ranks and both values; the others, who are alike, are told first."""
    cases = planted(clips, tmp_path)
    usual = cases.pop("")
    assert len(cases) >= 30
    for key, other in cases.items():
        heard = told([usual, usual, other])
        assert len(set(heard)) == 1
        was = usual.get(key, "absent")
        first = [f"the ranks of this job differ: {key} is {was} on rank {rank} (2 ranks)" for rank in (0, 1)]
        assert any(heard[0].startswith(f"{said} and another on rank 2; ") for said in first), heard[0]
    assert told([usual] * RANKS) == [""] * RANKS


def test_of_two_ranks_that_differ_the_lower_is_told_first_and_many_keys_are_counted() -> None:
    heard = told([{str(i): "a" for i in range(9)}, {str(i): "b" for i in range(9)}])
    assert heard[0] == heard[1] and "0 is a on rank 0 and b on rank 1" in heard[0]
    assert "3 is a on rank 0" in heard[0] and "4 is" not in heard[0] and "5 more of rank 1" in heard[0]


def test_what_a_rank_may_have_for_itself_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    before = software_alike()
    for name in PER_RANK:
        monkeypatch.setenv(name, "its own")
    assert software_alike() == before
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert software_alike() == before | {"variable NCCL_ALGO": "Ring"}


def test_another_source_is_another_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkouts of one version: a byte of one file of a folder."""
    files = [tmp_path / name for name in ("errors.py", "kernels/ops.py", "launch/cluster/alike.py", "setup.py")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a = 1\n")
    monkeypatch.setattr(alike, "__file__", str(files[2]))
    found: list[str] = []
    for path in (None, *files):
        if path is not None:
            path.write_text("a = 2\n")
        found.append(alike.code.__wrapped__())
    assert len(set(found)) == 4 and found[3] == found[4], "setup.py is no part of the package"


def a_program() -> Program:
    case = small_case(Plan(tp=2, cp=2))
    return build_step(case.config, case.plan, case.batch)


def other_order(program: Program) -> None:
    program.ops[3], program.ops[4] = program.ops[4], program.ops[3]


def other_buffer(program: Program) -> None:
    name, buffer = next((n, b) for n, b in program.buffers.items() if b.base is not None)
    program.buffers[name] = dataclasses.replace(buffer, offset=buffer.offset + 1)


def other_constant(program: Program) -> None:
    op = next(op for op in program.ops if "eps" in op.attrs)
    op.attrs = op.attrs | {"eps": 1e-6}


@pytest.mark.parametrize("change", [other_order, other_buffer, other_constant])
def test_a_program_that_differs_has_another_digest(change: Callable[[Program], None]) -> None:
    program = a_program()
    before = program_digest(copy.deepcopy(program))
    assert before == program_digest(a_program())
    change(program)
    assert program_digest(program) != before


ELSEWHERE = """
from cinemesh.launch.cluster.alike import program_digest
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.plan import Plan

case = small_case(Plan(tp=2, cp=2))
print(program_digest(build_step(case.config, case.plan, case.batch)))
"""


def test_a_digest_of_a_program_does_not_depend_on_the_process() -> None:
    """The order of a set of texts does: every process draws its own seed for it."""
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{program_digest(a_program())}\n", done.stderr


def test_a_round_begins_empty_whatever_the_one_before_left() -> None:
    """Killed at any point: after hello, or after it was welcomed, by a rank 0 that is dead, too."""
    job = HashStore()

    def arrives(rank: int) -> Any:
        return Meeting(job, token_of(job, rank, RANKS), rank, RANKS).store

    tokens: list[str] = []
    for stale in range(3):
        if stale:  # of a round that ended in its middle: one who asked and nobody answered, one who was answered
            job.set("cinemesh/hello/1", f"dead {stale}")
            job.set("cinemesh/hello/2", f"dead too {stale}")
            job.set(f"cinemesh/welcome/dead too {stale}", "an old token")
        with ThreadPoolExecutor(RANKS) as ranks:
            stores = list(ranks.map(arrives, range(RANKS)))
        assert not any(store.check(["address"]) for store in stores)
        stores[0].set("address", f"of round {stale}")
        assert all(store.get("address").decode() == f"of round {stale}" for store in stores)
        tokens.append(stores[0].get("address").decode())
    assert len(set(tokens)) == 3


@pytest.mark.parametrize(
    ("rank", "remedy"),
    [(0, "start all ranks of the job"), (1, r"start rank 0, and look .* \(MASTER_ADDR, MASTER_PORT\)")],
)
def test_a_rank_that_waits_in_vain_says_whom_to_start(rank: int, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store times out in another way for each: what holds a port is no answer to that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in there.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(meeting, "MEETING_S", 1.0)
    with pytest.raises(CinemeshError, match=rf"rank {rank} cannot meet the others at 127\.0\.0\.1:{port}.*; {remedy}"):
        meet()


DISAGREEING = """
import os, sys
from cinemesh.launch import train
sys.argv[1:] = [sys.argv[1], "--set", f"optimizer.lr=0.0{1 + int(os.environ['RANK'])}"]
train.main()
"""


@pytest.mark.slow
def test_under_torchrun_a_rank_of_another_recipe_is_one_error_before_the_first_step(
    clips: Path, tmp_path: Path
) -> None:
    """It trained on, and published a checkpoint of two models."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(clips, tmp_path, dp_shard=2)))
    (tmp_path / "job.py").write_text(DISAGREEING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "job.py"), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and done.stderr.count("error: ") == 1
    said = "error: the ranks of this job differ: optimizer.lr is 0.01 on rank 0 and 0.02 on rank 1; give every rank the"
    assert said in done.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
