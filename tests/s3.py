"""An object store on this machine: moto's S3 server on loopback, which keeps what it was asked and fails as planted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from cinemesh.launch.storage.remote import RemotePath

BUCKET = "runs"


@dataclass(frozen=True)
class Asked:
    """A request: ``PUT``, ``/runs/run/lease.json``, the header Range."""

    method: str
    path: str
    range: str


@dataclass
class Server:
    """``fails``: whether a request is answered with 500 Internal Server Error."""

    asked: list[Asked] = field(default_factory=list)
    fails: Callable[[Asked], bool] = lambda _: False
    url: str = ""

    def __post_init__(self) -> None:
        self._answer = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._asked, True, request_handler=MotoRequestHandler)
        self.url = f"http://127.0.0.1:{self._server.port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def _asked(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = Asked(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""))
        self.asked.append(asked)
        if self.fails(asked):
            start("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._answer(environ, start)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """In which ``s3://`` is this server."""
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        return keys | {"AWS_ENDPOINT_URL": self.url, "AWS_MAX_ATTEMPTS": "2"}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server with an empty bucket."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    files: Any = fsspec.filesystem("s3")
    files.mkdir(BUCKET)
    s3_server.asked.clear()
    yield s3_server
    s3_server.fails = lambda _: False
    files.rm(BUCKET, recursive=True)
    files.clear_instance_cache()


def bucket(name: str = "run") -> RemotePath:
    return RemotePath(f"s3://{BUCKET}/{name}")
