"""Requests to a page that is served to this machine."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

from cinemesh.evaluation.local_page import LocalServer

Page = TypeVar("Page", bound=LocalServer)


@contextmanager
def serving(server: Page) -> Iterator[Page]:
    """A page that answers for the time of the block."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(
    server: LocalServer, path: str, vote: object = None, *, method: str = "", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of a GET, or of what is posted as JSON: a value, or a text as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    body = vote if isinstance(vote, str) or vote is None else json.dumps(vote)
    given = {"Content-Type": "application/json"} if vote is not None else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if vote is None else "POST"), path, body, given | named)
    reply = connection.getresponse()
    found = reply.status, reply.read(), dict(reply.getheaders())
    connection.close()
    return found
