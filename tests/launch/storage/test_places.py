"""One way for files by path and by URL: what is created once, replaced, read in parts, listed and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from s3 import Server, bucket
from s3 import s3 as s3
from s3 import s3_server as s3_server

from cinemesh.errors import CinemeshError
from cinemesh.launch.storage import places
from cinemesh.launch.storage.places import (
    Location,
    check_folder,
    children,
    create_file,
    location_of,
    make_folder,
    modified,
    put_file,
    read_file,
    read_range,
    remove_folder,
    size_of,
    write_file,
)
from cinemesh.launch.storage.remote import RemotePath


@pytest.fixture(params=["path", "url"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "path":
        return tmp_path / "run"
    request.getfixturevalue("s3")
    return bucket()


def test_files_of_a_place(folder: Location) -> None:
    assert children(folder) == [] and not folder.exists() and size_of(folder / "a") is None
    make_folder(folder)
    for data in (b"0123456789", b"01234"):
        put_file(folder / "a", data)
        assert read_file(folder / "a", 100) == data and read_file(folder / "a", 3) == data[:3]
    write_file(folder / "b", map(memoryview, (b"01", b"", b"234")))
    assert read_range(folder / "b", 1, 4) == b"123" and size_of(folder / "b") == 5
    assert children(folder) == [folder / "a", folder / "b"] and (folder / "a").is_file() and not (folder / "a").is_dir()
    assert (modified(folder / "a") or 0) > 1e9 and modified(folder / "c") is None
    (folder / "a").unlink()
    (folder / "a").unlink(missing_ok=True)
    assert children(folder) == [folder / "b"] and folder.is_dir() and (folder / "b").parent == folder
    remove_folder(folder)
    assert children(folder) == [] and not folder.exists()


def test_of_many_that_create_a_file_one_does(folder: Location) -> None:
    make_folder(folder)

    def create(number: int) -> bool:
        return create_file(folder / "a", str(number).encode())

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(create, range(8)))
    assert sum(won) == 1 and read_file(folder / "a", 9) == str(won.index(True)).encode()
    assert children(folder) == [folder / "a"]


def test_a_file_that_was_not_written_to_its_end_is_none(folder: Location) -> None:
    """On an object store; by path half of one is there, and its folder has no manifest."""
    make_folder(folder)

    def broken() -> Iterator[memoryview]:
        yield memoryview(bytes(1 << 20))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(folder / "a", broken())
    assert isinstance(folder, Path) or not (folder / "a").exists()


def test_what_a_person_names() -> None:
    assert location_of("runs/a") == Path("runs/a") and location_of(Path("a")) == Path("a")
    assert location_of("file:///tmp/a") == Path("/tmp/a")
    assert (
        location_of("s3://bucket/run/") == RemotePath("s3://bucket/run") == location_of(RemotePath("s3://bucket/run"))
    )


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "foo://bucket/run",
            "foo://bucket/run: Protocol not known: foo; name a path, or a URL of what",
        ),
        ("s3:/bucket/run", "s3:/bucket/run is no URL; write two slashes"),
        ("s3://", "s3://: it names no bucket; write for example s3://bucket/run"),
        ("gs://bucket/run", "gs://bucket/run: .*gcsfs.*; install the package that it names"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(url: str, told: str) -> None:
    with pytest.raises(CinemeshError, match=told):
        location_of(url)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("cinemesh.launch.storage.remote._file_system", missing)
    with pytest.raises(CinemeshError, match=r"Install s3fs to access S3; pip install 'cinemesh\[s3\]'"):
        location_of("s3://bucket/run")


def asked(place: Location) -> list[Callable[[], object]]:
    return [
        lambda: put_file(place / "a", b""),
        lambda: create_file(place / "a", b""),
        lambda: write_file(place / "a", [memoryview(b"a")]),
        lambda: check_folder(place, "logging.checkpoints"),
    ]


def test_a_bucket_that_is_not_there_is_told(s3: Server) -> None:
    for write in asked(RemotePath("s3://nobody/run")):
        with pytest.raises(CinemeshError, match=r"cannot write s3://nobody/run/.*does not exist; make the bucket"):
            write()


def test_missing_credentials_are_told(s3: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(CinemeshError, match=r"logging.checkpoints: cannot write .*Unable to locate credentials"):
        check_folder(bucket(), "logging.checkpoints")


def test_a_server_that_fails_once_is_asked_again_and_one_that_goes_on_is_told(s3: Server) -> None:
    failed: list[object] = []

    def once(request: object) -> bool:
        failed.append(request)
        return len(failed) == 1

    s3.fails = once
    put_file(bucket() / "a", b"1")
    assert read_file(bucket() / "a", 1) == b"1"
    s3.fails = lambda _: True
    for ask in (*asked(bucket()), lambda: children(bucket()), lambda: read_file(bucket() / "a", 1)):
        with pytest.raises(CinemeshError, match=r"cannot (read|write|list) s3://runs/run.*that the server answers"):
            ask()


def test_an_answer_that_was_lost_is_no_other_writer(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object was written, the client heard nothing and asks again: its own bytes are there."""
    put_file(bucket() / "a", b"mine")
    assert create_file(bucket() / "a", b"mine") and not create_file(bucket() / "a", b"others'")


def test_a_store_without_conditions_is_known() -> None:
    assert RemotePath("s3://b/a").is_conditional and not RemotePath("memory://b/a").is_conditional
    assert places.free_bytes(RemotePath("s3://b/a")) is None
