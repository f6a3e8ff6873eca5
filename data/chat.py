"""One question to a chat model at an endpoint that speaks OpenAI's protocol (torch-free).

A request ends at its time limit whatever the other side does, follows no redirection, which could carry the key
elsewhere, and reads no answer beyond a limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # which no proxy reaches


def complete(url: str, key: str, asked: Mapping[str, Any], *, seconds: float, most_bytes: int) -> tuple[int, bytes]:
    """Status and body of the answer to ``asked``, the body cut one byte behind ``most_bytes``.

    ``url``: up to ``/v1``; ``key``: empty where it wants none. Raises TimeoutError after so many ``seconds``, and
    OSError, HTTPException or ValueError where no answer comes.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = Request(f"{url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), headers, method="POST")
    proxies = [ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
    opener = build_opener(_Stay, *proxies)
    return _within(seconds, lambda: _sent(opener, request, seconds, most_bytes))


class _Stay(HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the redirection is an error, and the key stays here."""


def _sent(opener: OpenerDirector, request: Request, seconds: float, most_bytes: int) -> tuple[int, bytes]:
    try:
        with opener.open(request, timeout=seconds) as reply:
            return reply.status, reply.read(most_bytes + 1)
    except HTTPError as error:
        with error:
            return error.code, error.read(most_bytes + 1)


def _within(seconds: float, work: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    """What ``work`` gives or raises; TimeoutError where it takes longer, and it is left to end by itself."""
    done: Future[tuple[int, bytes]] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001  it is raised where the result is taken
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done.result(timeout=seconds)
