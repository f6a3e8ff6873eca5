"""The page on which people judge, served to this machine alone.

It listens on 127.0.0.1, answers requests that name that host, and gives out the page, the files that ``pairs.json``
names, and a rater's own votes: nothing else has an address, so that no path leaves the folder, and no key is seen.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..documents import parse_json
from ..errors import CinemeshError
from .ballot_box import BallotBox
from .blinding import CLIPS, BlindPairs, read_pairs

HOST = "127.0.0.1"
TEMPLATES = Path(__file__).parent / "templates"
MOST_BYTES_OF_A_VOTE = 10_000  # a name and four words
IDLE_S = 60  # after which a connection without a request is closed
PIECE_BYTES = 2**20  # of a file, read and sent at once
TYPES = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.ASCII)


def page_of(shown: BlindPairs) -> str:
    """One file: style, script and guidelines inside it; pairs and votes come by request."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    axes = [
        {"name": axis.name, "question": axis.question, "guideline": axis.guideline,
         "reasons": [{"name": name, "text": text} for name, text in axis.reasons.items()]}
        for axis in shown.axes
    ]  # fmt: skip
    pairs = {pair.name: {"prompt": pair.prompt, "left": pair.left, "right": pair.right} for pair in shown.pairs}
    given = {"media": shown.media, "rate": shown.rate, "axes": axes, "pairs": pairs}
    return environment.get_template("judge.html").render(given=given, axes=shown.axes, media=shown.media)


class JudgeServer(ThreadingHTTPServer):
    """Serves the pairs of a folder; ``port`` 0 takes a free one. Raises CinemeshError where it cannot."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        shown = read_pairs(folder)
        self.page = page_of(shown).encode()
        self.files = {name: folder / CLIPS / name for pair in shown.pairs for name in (pair.left, pair.right)}
        self.box = BallotBox(folder, shown)
        try:
            super().__init__((HOST, port), JudgeHandler)
        except OSError as error:
            self.box.close()
            raise CinemeshError(
                f"cannot listen on {HOST}:{port}: {error.strerror}", remedy="give another --port"
            ) from error
        self.address = f"http://{HOST}:{self.server_port}/"

    def server_close(self) -> None:
        super().server_close()
        self.box.close()


class JudgeHandler(BaseHTTPRequestHandler):
    server: JudgeServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what a rater looks at is no news."""

    def do_GET(self) -> None:
        """The page, a file of a pair, or where a rater stands."""
        if not self._is_local():
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            self._send(self.server.page, "text/html; charset=utf-8")
        elif asked.path == "/state":
            rater = parse_qs(asked.query).get("rater", [""])[0]
            voted = {pair: {axis: [vote.answer, vote.reason] for axis, vote in votes.items()}
                     for pair, votes in self.server.box.of(rater).items()}  # fmt: skip
            self._send_json({"open": self.server.box.open_to(rater), "voted": voted})
        elif (file := self.server.files.get(asked.path.removeprefix(f"/{CLIPS}/"))) is not None:
            self._send_file(file)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        """A vote."""
        if not self._is_local():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES_OF_A_VOTE or self.path != "/vote":
            self.close_connection = True  # the body stays unread
            return self._refuse(HTTPStatus.BAD_REQUEST, "a vote is posted to /vote, and is short")
        body = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":  # which no foreign page may send unasked
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a vote is application/json")
        try:
            self.server.box.add(parse_json(body.decode(errors="replace"), "the vote", "vote on the page"))
        except CinemeshError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            return self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, f"the vote is not saved: {error.strerror}")
        self._send_json({"saved": True})

    def _is_local(self) -> bool:
        """That the browser means this server: a name that is made to lead here is another's page."""
        port = self.server.server_port
        if self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}"):
            return True
        self.close_connection = True
        self._refuse(HTTPStatus.FORBIDDEN, f"this page is at {self.server.address}")
        return False

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(json.dumps({"error": why}).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, path: Path) -> None:
        """Whole, or the range that a player asks for to go to a frame."""
        with path.open("rb") as file:
            size = path.stat().st_size
            first, last, status = 0, size - 1, HTTPStatus.OK
            if (asked := RANGE.fullmatch(self.headers.get("Range", ""))) and asked[1]:
                first, last = int(asked[1]), min(int(asked[2] or last), last)
                if first > last:
                    return self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"the file has {size} bytes")
                status = HTTPStatus.PARTIAL_CONTENT
            self.send_response(status)
            self.send_header("Content-Type", TYPES[path.suffix])
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
