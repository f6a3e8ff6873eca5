"""Work that processes share: each task is done by one, and an onlooker can tell who works from who waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cinemesh.data.cache.work import Task, claimed, share_out


class Noted:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def goes_on(self) -> None:
        self.heard.append("goes on")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.heard.append("waits")
        yield
        self.heard.append("has waited")


def made(path: Path) -> None:
    path.write_text("here")


def test_who_works_and_who_waits_is_told(tmp_path: Path) -> None:
    """Of three tasks one is done before, one another holds until it has made it, and one is left."""
    files = {name: tmp_path / name for name in ("before", "elsewhere", "here")}
    tasks = [Task(name, path, partial(made, path)) for name, path in files.items()]
    files["before"].write_text("before")
    onlooker, held, seen = Noted(), threading.Event(), list[int]()

    def other() -> None:
        with claimed(tmp_path, "elsewhere") as mine:
            assert mine
            held.set()
            while "has waited" not in onlooker.heard:
                pass
            files["elsewhere"].write_text("elsewhere")

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    share_out(tmp_path, tasks, seen.append, onlooker)
    thread.join()
    assert {path.read_text() for path in files.values()} == {"before", "elsewhere", "here"}
    assert onlooker.heard.count("goes on") == 1 and len(seen) == 3
    waits = [word for word in onlooker.heard if word != "goes on"]
    assert waits == ["waits", "has waited"] * (len(waits) // 2) != []
