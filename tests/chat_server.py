"""An endpoint on this machine that speaks OpenAI's protocol, well or badly: what it is asked, and what it answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cinemesh.evaluation.rewriting.endpoint import KEY_VARIABLE, URL_VARIABLE
from cinemesh.evaluation.rewriting.guideline import Parts

KEY = "sk-secret-0123456789"
Answer = Callable[["ChatHandler"], None]


def parts_of(prompt: str) -> Parts:
    """A good rewrite of a prompt like "a red car" under the guideline short."""
    return Parts(
        subject=f"The {prompt.removeprefix('a ')} by the sea", action="stands in the sun", background="", light="",
        camera="",
    )  # fmt: skip


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.answers, self.asked = answers, list[dict[str, Any]]()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class ChatHandler(BaseHTTPRequestHandler):
    server: ChatServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        number = min(len(self.server.asked), len(self.server.answers)) - 1
        self.server.answers[number](self)

    @property
    def prompt(self) -> str:
        return self.server.asked[-1]["messages"][-1]["content"]

    def reply(self, body: bytes, status: int = 200, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body) if length is None else length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def says(content: object, reason: str = "stop") -> Answer:
    """An answer with this content."""
    return lambda handler: handler.reply(chat(content, reason))


def chat(content: object, reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
    return json.dumps({"choices": [choice]}).encode()


def rewrites(handler: ChatHandler) -> None:
    """Well."""
    handler.reply(chat(parts_of(handler.prompt).answer()))


def hangs(handler: ChatHandler) -> None:
    """A byte of a header now and then, for ever: no time-out of a socket ends it."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    try:
        while not handler.server.ended.wait(0.05):
            handler.wfile.write(b"X")
            handler.wfile.flush()
    except OSError:
        pass


def fails(handler: ChatHandler) -> None:
    handler.reply(json.dumps({"error": {"message": f"no such model, {KEY}"}}).encode(), 500)


def breaks(handler: ChatHandler) -> None:
    """In the middle of its JSON."""
    whole = chat(parts_of(handler.prompt).answer())
    handler.reply(whole[: len(whole) // 2], length=len(whole))


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> Iterator[ChatServer]:
    """The endpoint of the environment; the last answer is given again and again."""
    server = ChatServer([*answers])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv(URL_VARIABLE, server.url)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
