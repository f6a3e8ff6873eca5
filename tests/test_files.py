"""Output paths: what cannot be written is told before the work, what is written appears whole and for all to read."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.files import atomic_file, check_output_file, check_output_folder

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that root cannot write to: /proc")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("folder", "is a directory; name a file"),
        ("file/x.yaml", "file is a file, where a folder is wanted"),
        ("file/y/x.yaml", "file is a file, where a folder is wanted|Not a directory"),
        ("pipe", "exists and is no regular file"),
        ("n" * 250, "cannot be written: File name too long"),  # with what atomic_file adds to it
        ("a\0b", "cannot be written: .*null"),
        pytest.param("/proc/x.yaml", "cannot be written: ", marks=linux),
        pytest.param("/proc/x/y.yaml", "cannot be written: ", marks=linux),
    ],
)
def test_a_file_that_cannot_be_written_is_told_and_nothing_is_left(tmp_path: Path, path: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CinemeshError, match=f"^--out .*({said})"):
        check_output_file(tmp_path / path, "--out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_a_file_that_can_be_written_may_be_there_or_lack_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").touch()
    monkeypatch.chdir(tmp_path)
    for path in (Path("old"), Path("new"), Path("a/b/c.yaml"), tmp_path / "d" / "e"):
        check_output_file(path, "--out")
        check_output_folder(path.parent, "--report")
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


@linux
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(CinemeshError, match=r"^--report "):
            check_output_folder(path, "--report")


def test_a_written_file_obeys_the_umask_whatever_its_writer_did(tmp_path: Path) -> None:
    """safetensors creates its files for their owner alone: others could not read a shared cache."""
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "x") as part:
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_what_the_file_system_refuses_meanwhile_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"cannot write .*x: No space left on device"), atomic_file(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
