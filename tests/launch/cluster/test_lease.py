"""One job at a time in a directory; what a dead one left is seen to be dead, whoever has its process's number now."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import recipe

from cinemesh.errors import CinemeshError
from cinemesh.launch import train
from cinemesh.launch.cluster import lease
from cinemesh.launch.cluster.lease import LEASE, Holder, leased

HOLDS = """
import sys
from pathlib import Path
from cinemesh.launch.cluster.lease import leased

with leased(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 0.2)
    monkeypatch.setattr(lease, "POLL_S", 0.02)


def left_by(directory: Path, holder: Holder, *, ago_s: float = 0.0) -> Path:
    """A lease as another process left it."""
    path = directory / LEASE
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - ago_s))
    return path


def test_a_second_job_is_one_error_and_a_killed_one_is_in_nobody_s_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process: held, given back, and killed with SIGKILL while it holds."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    for killed in (False, True):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            said = (
                rf"{re.escape(str(tmp_path))} is in use by process {holder.pid} on .*, there since 20.*; end that job"
            )
            with pytest.raises(CinemeshError, match=said), leased(tmp_path):
                pass
            if killed:
                holder.kill()
        assert (tmp_path / LEASE).exists() == killed
        with leased(tmp_path):
            assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()
        told = capsys.readouterr().err
        assert (f"taken over: process {holder.pid} on" in told) == killed, told
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    left_by(tmp_path, replace(Holder.here(), start="7"))
    with leased(tmp_path):
        pass


def test_from_another_host_it_is_the_file_s_time_that_tells(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Old: at once. Young, and renewed while we wait: in use. Young and never renewed, of a clock ahead too: stale."""
    elsewhere = replace(Holder.here(), host="node-17", boot="other")
    with monkeypatch.context() as patch:
        patch.setattr(lease.time, "sleep", lambda _: pytest.fail("waits"))
        left_by(tmp_path, elsewhere, ago_s=60)
        with leased(tmp_path):
            pass
    path = left_by(tmp_path, elsewhere)
    with monkeypatch.context() as patch:
        patch.setattr(lease.time, "sleep", lambda _: os.utime(path, (1, 1)))
        with pytest.raises(CinemeshError, match=r"in use by process \d+ on node-17"), leased(tmp_path):
            pass
    for ahead_s in (0, 1000):
        left_by(tmp_path, elsewhere, ago_s=-ahead_s)
        with leased(tmp_path):
            pass
        assert "waiting up to 0 s to see whether it is renewed" in capsys.readouterr().err


def test_a_job_that_was_started_again_elsewhere_has_its_own_lease_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease.time, "sleep", lambda _: pytest.fail("waits"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    left_by(tmp_path, replace(Holder.here(), host="node-17", boot="other"))
    with leased(tmp_path):
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torch's default: of any job
    assert Holder.here().job == ""


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 3}', '{"pid": 3, "host": 4'])
def test_a_lease_that_cannot_be_read_is_of_somebody_while_it_is_renewed(
    text: str, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LEASE
    path.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(lease.time, "sleep", lambda _: os.utime(path, (1, 1)))
        with pytest.raises(CinemeshError, match="in use by a job that does not say which"), leased(tmp_path):
            pass
    os.utime(path)
    with leased(tmp_path):
        pass


@pytest.mark.parametrize("killed_in_its_turn", [False, True])
def test_of_many_that_find_a_stale_lease_one_has_it(tmp_path: Path, impatient: None, killed_in_its_turn: bool) -> None:
    """All of them take away what is stale: none may take away another's."""
    jobs = 8
    if killed_in_its_turn:
        (tmp_path / f".{LEASE}.turn").touch()
        os.utime(tmp_path / f".{LEASE}.turn", (1, 1))
    left_by(tmp_path, replace(Holder.here(), start="7"))

    def tries(_: int) -> Any:
        mine = Holder.here()
        try:
            lease._take(tmp_path / LEASE, mine)
        except CinemeshError as error:
            return error
        return mine

    with ThreadPoolExecutor(jobs) as threads:
        found = list(threads.map(tries, range(jobs)))
    (won,) = (one for one in found if isinstance(one, Holder))
    assert lease._holder(tmp_path / LEASE) == won
    assert {*tmp_path.iterdir()} == {tmp_path / LEASE, lease.beats(tmp_path / LEASE, won)}


def test_training_holds_the_lease_of_its_directory(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    """From before the plan is settled to the end; a job that is refused leaves nothing behind."""
    values = recipe(clips, tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    seen: list[bool] = []
    from cinemesh.launch.training import loop

    monkeypatch.setattr(loop, "run", lambda **_: seen.append((tmp_path / "run" / LEASE).exists()))
    train.run(config=tmp_path / "recipe.yaml", nproc=None, overrides=[])
    assert seen == [True] and not (tmp_path / "run").exists()
    with leased(tmp_path / "run"), pytest.raises(CinemeshError, match=r"run is in use by process"):
        train.run(config=tmp_path / "recipe.yaml", nproc=None, overrides=[])
    assert len(seen) == 1
