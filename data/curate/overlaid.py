"""Text in the picture: subtitles, titles, logos with letters. RapidOCR finds and reads it, with the models it ships.

A frame's score is the highest product of detection and recognition confidence of any text in it, a clip's that of its
worst frame, of one a second (Movie Gen, Table 38: below 0.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa

from ...errors import CinemeshError
from ...ranges import check_ranges, integers, reals
from .detectors import PACKAGE
from .pictures import decode
from .rows import ClipRow, titled
from .samples import a_second_apart

LEAST_LETTERS = 2  # that are read: one alone is a window bar, or a twig
TextPx = Annotated[int, integers(32, 4096, "letters are lost in smaller pictures", "pixels")]
TextScore = Annotated[float, reals(0.01, 1, "a product of two confidences")]


@dataclass(frozen=True)
class TextMeasure:
    """Of every clip. ``px``: short side to which smaller samples are enlarged, so that small letters are found."""

    px: TextPx = 352

    name: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("samples",)
    unit: ClassVar[int] = 4
    columns: ClassVar[tuple[pa.Field, ...]] = (
        titled("text_score", pa.float32(), "detection times recognition confidence, the highest; 0: no text"),
        titled("text", pa.string(), "what was read with that score"),
    )

    def of(self, rows: Sequence[ClipRow]) -> list[ClipRow]:
        made: list[ClipRow] = []
        for row in rows:
            read = [found for data in a_second_apart(row["samples"], row["seconds"]) for found in self._read(data)]
            score, text = max(read, default=(0.0, None))
            made.append({"id": row["id"], "text_score": score, "text": text})
        return made

    def _read(self, data: bytes) -> list[tuple[float, str]]:
        """Score and letters of every text of a picture."""
        engine = _engine(self.px)
        picture = np.ascontiguousarray(np.asarray(decode(data))[:, :, ::-1])
        find = engine._load_det_model()  # its own call sorts boxes and leaves their scores behind
        prepared = find.get_preprocess()(picture)
        boxes, scores = find.postprocess_op(find.session(prepared), picture.shape[:2])
        if not len(boxes):
            return []
        told = engine.recognize_txt(engine.crop_text_regions(picture, np.asarray(boxes, np.float32)))
        return [
            (float(a) * float(b), text)
            for a, b, text in zip(scores, told.scores, told.txts, strict=True)
            if sum(sign.isalnum() for sign in text) >= LEAST_LETTERS
        ]


@dataclass(frozen=True)
class Text:
    """The score stays below ``below``."""

    below: TextScore = 0.6

    needs: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        check_ranges(self, "text.")

    def dropped(self, row: ClipRow) -> str | None:
        score = row["text_score"]
        return None if score is None or score < self.below else f"it shows text: {row['text']!r} ({score:.2f})"


@cache
def _engine(px: int) -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise CinemeshError(
            "the stage text needs the package rapidocr, which is not installed",
            remedy=f"{PACKAGE}, or switch the stage off: text: null",
        ) from error
    one = "EngineConfig.onnxruntime"
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.limit_side_len": px,
            "Det.limit_type": "min",
            f"{one}.intra_op_num_threads": 1,
            f"{one}.inter_op_num_threads": 1,
        }
    )
