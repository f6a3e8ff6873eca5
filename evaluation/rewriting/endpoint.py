"""A chat model at an endpoint that speaks OpenAI's protocol (torch-free).

Address and key come from the environment, and stand in no message, file or cache. How it asks: ``data/chat.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from ...data.chat import complete
from ...documents import parse_json, quoted
from ...errors import CinemeshError, in_a_line
from .guideline import Message
from .settings import RewriterSettings

URL_VARIABLE, KEY_VARIABLE = "CINEMESH_REWRITE_URL", "CINEMESH_REWRITE_KEY"
MOST_BYTES = 2**20  # of an answer; one of 120 words has 2,000
SECRET = 6  # signs of a key, of which a message holds no more in a row
SEE = "see to the endpoint, or to timeout_s and tries of the rewriter"
NO_CHAT = "take an endpoint that answers as OpenAI's chat completions do"


class Unreached(CinemeshError):
    """No answer of the model came: another prompt would fare no better."""


class Endpoint:
    """See ``rewriter.ChatModel``."""

    def __init__(self, settings: RewriterSettings) -> None:
        self._settings = settings
        self._asked = {
            "model": settings.model,
            "max_tokens": settings.answer_tokens,
            **settings.request,
        }
        self.identity = f"endpoint {json.dumps(self._asked, sort_keys=True)}"

    def ask(self, messages: Sequence[Message]) -> str:
        """The model's answer. Raises Unreached where none comes, CinemeshError for one that is no text."""
        url, key = _address(), _key()
        asked, seconds = self._asked | {"messages": [*messages]}, self._settings.timeout_s
        try:
            status, read = complete(url, key, asked, seconds=seconds, most_bytes=MOST_BYTES)
        except TimeoutError:
            raise Unreached(f"the endpoint has not answered within {seconds:g} s", remedy=SEE) from None
        except (OSError, HTTPException, ValueError) as error:
            raise Unreached(f"the endpoint cannot be reached: {_said(in_a_line(error), key)}", remedy=SEE) from None
        if len(read) > MOST_BYTES:
            raise CinemeshError(f"the endpoint's answer has more than {MOST_BYTES:,} bytes", remedy=NO_CHAT)
        text = read.decode(errors="replace")
        if status != 200:
            raise Unreached(f"the endpoint answered {status}{_reason(status, text, key)}", remedy=SEE)
        return _content(parse_json(text, "the endpoint's answer", NO_CHAT), self._settings.answer_tokens)


def _content(answer: Any, tokens: int) -> str:
    """Of the first choice. Raises CinemeshError for one that is cut, or no text."""
    match answer:
        case {"choices": [{"message": {"content": str(content)}, **rest}, *_]}:
            if rest.get("finish_reason") == "length":
                raise CinemeshError(
                    f"the answer is cut at {tokens} tokens: {quoted(content)}", remedy="raise answer_tokens"
                )
            return content
    raise CinemeshError(f"the endpoint's answer holds no text of a first choice: {quoted(answer)}", remedy=NO_CHAT)


def _address() -> str:
    url = os.environ.get(URL_VARIABLE, "").strip()
    if not url:
        raise Unreached(f"{URL_VARIABLE} is not set", remedy=f"export {URL_VARIABLE}=http://host:8000/v1")
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isascii()
    except ValueError:
        whole = False
    if not whole or any(sign.isspace() for sign in url):
        raise Unreached(f"{URL_VARIABLE} is no address", remedy="write it as http://host:8000/v1, or with https")
    return url


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise Unreached(f"{KEY_VARIABLE} holds signs that no header may", remedy="set it anew")
    return key


def _reason(status: int, text: str, key: str) -> str:
    """What the endpoint says of a request that it refuses, but for one about the key."""
    if status in (401, 403):
        return f": see to {KEY_VARIABLE}"
    try:
        found = parse_json(text, "the reason", "")
    except CinemeshError:
        return ""
    match found:
        case {"error": {"message": str(said)}} | {"error": str(said)} | {"message": str(said)}:
            return f": {_said(quoted(said), key)}"
    return ""


def _said(text: str, key: str) -> str:
    """``text``, unless it holds a part of the key."""
    parts = (key[i : i + SECRET] for i in range(max(1, len(key) - SECRET + 1)))
    return "it is not said, since it holds the key" if key and any(part in text for part in parts) else text
