"""A run whose checkpoints are on an object store: killed, refused, served badly, it ends as one on a disk does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from s3 import Server, bucket
from s3 import s3 as s3
from s3 import s3_server as s3_server
from training import recipe, start, states, states_in

from cinemesh.errors import CinemeshError
from cinemesh.launch import train
from cinemesh.launch.cluster.lease import LEASE, Holder, leased
from cinemesh.launch.storage.places import children, put_file
from cinemesh.launch.training.checkpoint import writing
from cinemesh.launch.training.checkpoint.choosing import latest
from cinemesh.launch.training.checkpoint.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("one_process")

KILLED = """
import os, signal, sys
from pathlib import Path
from cinemesh.launch.training import loop
from cinemesh.launch.training.checkpoint import writing

write = writing.write_file

def half(file, chunks):
    if file.parent.name == "step-00000004":
        states = chunks[1]
        def until():
            yield states[: len(states) // 2]
            os.kill(os.getpid(), signal.SIGKILL)
        chunks = until()
    write(file, chunks)

writing.write_file = half
loop.run(config=Path(sys.argv[1]), nproc=None, overrides=[])
"""


def by_url(values: dict[str, Any], out: Path) -> dict[str, Any]:
    logging = values["logging"] | {"checkpoints": str(bucket()), "directory": str(out / "run"), "checkpoint_every": 2}
    return values | {"logging": logging}


def assert_ends_alike(clips: Path, tmp_path: Path, ended: dict[str, Any]) -> None:
    """Against a run of the same recipe on a disk."""
    values = recipe(clips, tmp_path)
    assert start(values, tmp_path) == 0
    newest = latest(bucket())
    assert newest is not None and newest.name == "step-00000006"
    want, got = states(tmp_path / "run", values), states_in(newest, ended)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_killed_in_the_middle_of_a_write_it_ends_as_one_on_a_disk(s3: Server, clips: Path, tmp_path: Path) -> None:
    values = by_url(recipe(clips, tmp_path), tmp_path / "far")
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(values))
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "far.yaml")], env=os.environ | s3.environment, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    newest = latest(bucket())
    assert newest is not None and newest.name == "step-00000002"
    assert [path.name for path in children(bucket())] == ["step-00000002", "step-00000004"]
    assert not (bucket() / "step-00000004" / MANIFEST).exists()
    assert start(values, tmp_path) == 0
    assert [path.name for path in children(bucket())] == ["step-00000004", "step-00000006"]
    assert not (tmp_path / "far/run/checkpoints").exists() and (tmp_path / "far/run/metrics.jsonl").exists()
    assert_ends_alike(clips, tmp_path, values)


def test_a_server_that_fails_is_told_and_the_third_save_in_a_row_ends_the_run(
    s3: Server,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written_at_once: None,
) -> None:
    monkeypatch.setattr(writing, "RETRY_AFTER_S", 0.0)
    values = by_url(recipe(clips, tmp_path), tmp_path)
    values["logging"]["checkpoint_every"] = 1
    s3.fails = lambda one: one.method in ("PUT", "POST") and "step-00000002" in one.path
    assert start(values, tmp_path, "schedule.steps=3", "schedule.warmup_steps=2") == 0
    told = capsys.readouterr().out
    assert told.count("WARNING: cannot write s3://") == 1 and "The run goes on" in told
    s3.fails = lambda one: one.method in ("PUT", "POST")
    assert start(values, tmp_path) == 2
    assert "That was checkpoint 3 in a row" in capsys.readouterr().err
    newest = latest(bucket())
    assert newest is not None and newest.name == "step-00000003"


def test_a_second_job_is_refused_wherever_its_logs_are(s3: Server, clips: Path, tmp_path: Path) -> None:
    values = by_url(recipe(clips, tmp_path), tmp_path / "other")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with leased(bucket()), pytest.raises(CinemeshError, match=r"s3://runs/run is in use by process \d+ on"):
        train.run(config=tmp_path / "recipe.yaml", nproc=None, overrides=[])
    assert children(bucket()) == []
    put_file(bucket() / LEASE, json.dumps(asdict(replace(Holder.here(), start="7"))).encode())  # of a dead process
    with leased(bucket()):
        assert json.loads((bucket() / LEASE).read())["pid"] == os.getpid()
    assert children(bucket()) == []


def test_what_nobody_reaches_is_refused_before_anything_is_made(s3: Server, clips: Path, tmp_path: Path) -> None:
    values = by_url(recipe(clips, tmp_path), tmp_path / "other")
    for url, said in (
        ("s3://nobody/run", "make the bucket"),
        ("foo://a/b", "Protocol not known"),
        ("s3:/a", "slashes"),
    ):
        values["logging"]["checkpoints"] = url
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(CinemeshError, match=said):
            train.run(config=tmp_path / "recipe.yaml", nproc=None, overrides=[])
    assert not (tmp_path / "other").exists()
