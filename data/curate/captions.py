"""Captions of clips: from a file, by the largest overlap, or from an endpoint that speaks OpenAI's protocol.

A clip is told by one of two models, 70 % by the first (the paper's 8B and 70B), drawn by its id. What is trained on
begins with the clip's rate and its camera class: ``FPS-16 zoom in. A dog runs.``; the rate is put there when windows
are cut, the class here.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from ...documents import parse_json
from ...errors import CinemeshError, in_a_line
from ...ranges import SEED_RANGE, check_ranges, integers, reals
from ..chat import complete
from ..scenes import Scene
from ..text import TextEncoder, with_fps
from .camera import CameraPrefix, HandLabel
from .rows import ClipRow, draw_of, titled

PROMPT = "Describe this video clip in one paragraph of about 100 words. The pictures are frames of it, in order."
KEY = "CINEMESH_CAPTION_KEY"  # environment variable with the endpoint's key, where it wants one
TIMEOUT_S = 300.0
MOST_BYTES = 2**22  # of a reply
FirstShare = Annotated[float, reals(0.01, 1.0, "a share of the clips")]
CaptionFrames = Annotated[int, integers(1, 256, "no model reads more", "frames")]
S = TypeVar("S", Scene, HandLabel)  # frames of a file
Letters = Annotated[int, integers(16, 10**5, "no encoder reads more", "tokens")]


@dataclass(frozen=True)
class CaptionEndpoint:
    """``url`` up to ``/v1``; ``models``: one, or two of which the first tells ``first_share`` of the clips."""

    url: str
    models: tuple[str, ...]
    first_share: FirstShare = 0.7
    frames: CaptionFrames = 8
    prompt: str = PROMPT
    most_tokens: Letters = 256
    seed: Annotated[int, SEED_RANGE] = 0

    def __post_init__(self) -> None:
        check_ranges(self, "endpoint: ")
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise CinemeshError(f"url is {self.url!r:.100}", remedy="it must begin with http:// or https://")
        if not 1 <= len(self.models) <= 2:
            raise CinemeshError(f"models are {len(self.models)}", remedy="name one or two")

    def model_of(self, row_id: str) -> str:
        """Which one tells a clip."""
        return self.models[0] if draw_of(self.seed, "caption", row_id) < self.first_share else self.models[-1]


@dataclass(frozen=True)
class CaptionMeasure:
    """Of every clip that nothing else dropped."""

    endpoint: CaptionEndpoint

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("samples",)
    unit: ClassVar[int] = 4
    columns: ClassVar[tuple[pa.Field, ...]] = (
        titled("told", pa.string(), "what the model told"),
        titled("told_by", pa.string(), "the model"),
    )

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        made: list[ClipRow] = []
        for row in rows:
            model = self.endpoint.model_of(row["id"])
            made.append({"id": row["id"], "told": _told(self.endpoint, model, row["samples"]), "told_by": model})
        return made


def _told(endpoint: CaptionEndpoint, model: str, samples: Sequence[bytes]) -> str:
    """What a model says of a clip. Raises CinemeshError for no answer, and for one that holds no text."""
    count = min(endpoint.frames, len(samples))
    shown = [samples[int((part + 0.5) * len(samples) / count)] for part in range(count)]
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}}
        for data in shown
    ]
    asked = {
        "model": model,
        "temperature": 0,
        "max_tokens": endpoint.most_tokens,
        "messages": [{"role": "user", "content": [{"type": "text", "text": endpoint.prompt}, *pictures]}],
    }
    address = f"{endpoint.url.rstrip('/')}/chat/completions"
    remedy = "start it, and run the same command again: captions that were told stay"
    key = os.environ.get(KEY, "")
    try:
        status, read = complete(endpoint.url, key, asked, seconds=TIMEOUT_S, most_bytes=MOST_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        raise CinemeshError(f"{address} gives no caption: {in_a_line(error)}", remedy=remedy) from error
    if status != HTTPStatus.OK:
        raise CinemeshError(f"{address} gives no caption: it answers {status}", remedy=remedy)
    told = parse_json(read.decode("utf-8", "replace"), f"the reply of {address}", "see to the endpoint")
    try:
        said = told["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        said = None
    if not isinstance(said, str) or not said.strip():
        raise CinemeshError(f"the reply of {address} holds no text of {model}", remedy="see to the endpoint")
    return " ".join(said.split())


def by_overlap(rows: Sequence[ClipRow], spans: Sequence[S]) -> dict[str, S]:
    """By id, the span of the same file that shares most frames with a clip; none where none does."""
    found: dict[str, S] = {}
    for row in rows:
        name = Path(row["file"]).name
        shared = [
            (min(span.last_frame, row["last_frame"]) - max(span.first_frame, row["first_frame"]) + 1, -number)
            for number, span in enumerate(spans)
            if span.file == name
        ]
        most, number = max(shared, default=(0, 0))
        if most > 0:
            found[row["id"]] = spans[-number]
    return found


def check_told(rows: Sequence[ClipRow], captions: Mapping[str, object], path: Path) -> None:
    """Raises CinemeshError for kept clips that no scene of the file overlaps."""
    lacking = [row for row in rows if row["id"] not in captions]
    if lacking:
        named = ", ".join(
            f"{Path(row['file']).name} {row['first_frame']} to {row['last_frame']}" for row in lacking[:3]
        )
        raise CinemeshError(
            f"{len(lacking)} of {len(rows)} clips have no caption in {path}: frames of {named}"
            f"{', ...' * (len(lacking) > 3)}",
            remedy="add scenes there, give measure.endpoint, or leave captions out",
        )


def prefixed(caption: str, row: ClipRow, prefix: CameraPrefix | None) -> str:
    """With the camera class before it, where that is sure."""
    camera = None if prefix is None else prefix.of(row)
    return caption if camera is None else f"{camera}. {caption}"


def too_long(rows: Sequence[ClipRow], encoders: Sequence[TextEncoder]) -> dict[str, Any]:
    """By encoder, how many captions it would cut, at the rates of their files."""
    told = [
        row["caption"] if row["kind"] == "image" else with_fps(Fraction(row["fps"]), row["caption"])
        for row in rows
        if row["caption"] is not None
    ]
    return {
        encoder.name: {
            "tokens": encoder.tokens,
            "longest": max((encoder.length(each) for each in told), default=0),
            "cut": sum(encoder.length(each) > encoder.tokens for each in told),
        }
        for encoder in encoders
    }
