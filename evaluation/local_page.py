"""A page served to this machine alone: what the servers of pages share (torch-free).

It listens on 127.0.0.1 and answers requests that name that host, so that no page of another one can ask or post.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..documents import parse_json
from ..errors import CinemeshError

HOST = "127.0.0.1"
TEMPLATES = Path(__file__).parent / "templates"
IDLE_S = 60  # after which a connection without a request is closed
PIECE_BYTES = 2**20  # of a file, read and sent at once
TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.ASCII)


def rendered(template: str, **values: Any) -> bytes:
    """A page of ``templates``; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values).encode()


class LocalServer(ThreadingHTTPServer):
    """Serves ``page`` and what its handler adds; ``port`` 0 takes a free one. Raises CinemeshError where it cannot."""

    daemon_threads = True

    def __init__(self, page: bytes, port: int, handler: type[LocalHandler]) -> None:
        self.page = page
        try:
            super().__init__((HOST, port), handler)
        except OSError as error:
            raise CinemeshError(
                f"cannot listen on {HOST}:{port}: {error.strerror}", remedy="give another --port"
            ) from error
        self.address = f"http://{HOST}:{self.server_port}/"


class LocalHandler(BaseHTTPRequestHandler):
    """Of requests to a :class:`LocalServer`."""

    server: LocalServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what a person looks at is no news."""

    def is_local(self) -> bool:
        """That the browser means this server: a name that is made to lead here is another's page."""
        port = self.server.server_port
        if self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}"):
            return True
        self.close_connection = True
        self.refuse(HTTPStatus.FORBIDDEN, f"this page is at {self.server.address}")
        return False

    def posted(self, path: str, what: str, most_bytes: int) -> Any:
        """The JSON value that the page posts to ``path``. Raises CinemeshError for anything else."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > most_bytes or self.path != path:
            self.close_connection = True  # the body stays unread
            raise CinemeshError(f"{what} is posted to {path}, and is short")
        body = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":  # which no foreign page may send unasked
            raise CinemeshError(f"{what} is application/json")
        return parse_json(body.decode(errors="replace"), what, "use the page")

    def save(self, path: str, what: str, most_bytes: int, add: Callable[[Any], object]) -> None:
        """An answer that the page posts: given to ``add``, and confirmed when that is done."""
        if not self.is_local():
            return
        try:
            add(self.posted(path, what, most_bytes))
        except CinemeshError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            return self.refuse(HTTPStatus.INSUFFICIENT_STORAGE, f"{what} is not saved: {error.strerror}")
        self.send_json({"saved": True})

    def send_json(self, value: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_whole(json.dumps(value).encode(), "application/json", status)

    def refuse(self, status: HTTPStatus, why: str) -> None:
        self.send_json({"error": why}, status)

    def send_page(self) -> None:
        self.send_whole(self.server.page, "text/html; charset=utf-8")

    def send_whole(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        """A reply that no cache keeps, and of no other type than it says."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, path: Path) -> None:
        """Whole, or the range that a player asks for to go to a frame."""
        with path.open("rb") as file:
            size = path.stat().st_size
            first, last, status = 0, size - 1, HTTPStatus.OK
            if (asked := RANGE.fullmatch(self.headers.get("Range", ""))) and asked[1]:
                first, last = int(asked[1]), min(int(asked[2] or last), last)
                if first > last:
                    return self.refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"the file has {size} bytes")
                status = HTTPStatus.PARTIAL_CONTENT
            self.send_response(status)
            self.send_header("Content-Type", TYPES.get(path.suffix.lower(), "application/octet-stream"))
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Accept-Ranges", "bytes")
            if status is HTTPStatus.PARTIAL_CONTENT:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            file.seek(first)
            left = last - first + 1
            while left and (piece := file.read(min(PIECE_BYTES, left))):
                try:
                    self.wfile.write(piece)
                except ConnectionError:  # the player has what it wants
                    self.close_connection = True
                    return
                left -= len(piece)
