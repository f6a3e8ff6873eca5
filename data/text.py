"""Frozen text encoders: a caption becomes a fixed number of embeddings and a mask.

The paper uses three (UL2, MetaCLIP, ByT5; 3.1.4), each followed in the model by its own Linear and
LayerNorm. Here: bytes, which need no weights, and any encoder directory of ``transformers``.
An encoder's ``name`` is the key of its embeddings in the model, in the cache and in a batch.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CinemeshError, in_a_line
from ..kernels.philox import Purpose, uniform
from ..ranges import check_ranges, integers

Tokens = Annotated[int, integers(1, 4096, "no caption is longer, and attention sees them all", "tokens")]
EmbeddingWidth = Annotated[int, integers(1, 16_384, "no text encoder is wider")]
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # parameters, inputs and tensors of the cache are called after an encoder
END = 256  # the token after a caption's last byte: an empty caption still has one valid key
LONGEST_PERIOD = 10_000.0  # tokens; of the sinusoidal position features of Vaswani et al., 3.5


def with_fps(rate: Fraction, caption: str) -> str:
    """A caption that tells at how many frames/s its clip plays (Movie Gen, 3.2.1: ``FPS-16``, before the text)."""
    return f"FPS-{round(rate)} {caption}"


class TextEncoder(Protocol):
    """A frozen encoder of captions."""

    name: str
    tokens: int  # embeddings of every caption, padding included

    @property
    def width(self) -> int:
        """Length of an embedding."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever ``encode`` would give other embeddings."""
        ...

    def length(self, caption: str) -> int:
        """Tokens of the whole caption; where they are more than ``tokens``, ``encode`` cuts it."""
        ...

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embeddings float32 [tokens, width], zero as padding; bool mask [tokens], True = valid.

        A longer caption is cut, never inside a character. At least one token is valid.
        """
        ...


class ByteEncoder:
    """UTF-8 bytes and an end token, each a fixed random vector plus sinusoidal position features.

    The vectors are uniform with variance 1, a function of (byte, index) through Philox in exact
    arithmetic, so the table is the same everywhere and needs no file.
    """

    def __init__(self, width: int, tokens: int, name: str = "bytes") -> None:
        if width < 1 or tokens < 1:
            raise CinemeshError(f"text encoder {name}: width({width}) and tokens({tokens}) must be at least 1")
        self.name, self.width, self.tokens = name, width, tokens
        zero = torch.tensor(0)
        draws = uniform(0, Purpose.INIT, zero, zero, torch.arange((END + 1) * width))
        self._table = ((2.0 * draws - 1.0) * math.sqrt(3.0)).view(END + 1, width)  # float64
        pairs = torch.arange((width + 1) // 2, dtype=torch.float64)
        angles = torch.arange(tokens)[:, None] * LONGEST_PERIOD ** (-2.0 * pairs / width)
        self._position = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]

    @property
    def fingerprint(self) -> str:
        """The table's bits and the sizes that fix the rest."""
        table = hashlib.sha256(self._table.numpy().tobytes()).hexdigest()[:16]
        return f"utf8-{self.width}x{self.tokens}-{table}"  # "bytes-" cut inside characters

    def length(self, caption: str) -> int:
        """See ``TextEncoder.length``; the end token counts."""
        return len(caption.encode()) + 1

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """See ``TextEncoder.encode``. A cut caption keeps its end token."""
        beginning = caption.encode()[: self.tokens - 1].decode(errors="ignore")  # of a character, all bytes or none
        ids = [*beginning.encode(), END]
        embeddings = torch.zeros(self.tokens, self.width)
        embeddings[: len(ids)] = (self._table[ids] + self._position[: len(ids)]).float()
        return embeddings, torch.arange(self.tokens) < len(ids)


class HuggingFaceEncoder:
    """The last hidden states of a text encoder saved by ``transformers`` in a directory.

    Of an encoder-decoder (T5, UL2, ByT5) only the encoder is loaded, of a two-tower model (CLIP)
    only the text tower. Weights are read at the first ``encode``, in float32, never downloaded.
    """

    def __init__(self, directory: Path, tokens: int, name: str | None = None) -> None:
        self.directory, self.tokens, self.name = directory, tokens, name or directory.name
        if tokens < 1:
            raise CinemeshError(f"text encoder {self.name}: tokens({tokens}) must be at least 1")
        if not (directory / "config.json").is_file():
            raise CinemeshError(
                f"text encoder {self.name}: {directory} has no config.json",
                remedy="name a directory that transformers saved (model.save_pretrained and tokenizer.save_pretrained)",
            )
        limit = getattr(self._config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise CinemeshError(
                f"text encoder {self.name}: tokens({tokens}) > {limit} positions of the model in {directory}",
                remedy=f"set tokens to at most {limit}",
            )

    @cached_property
    def _config(self) -> Any:
        return self._load("AutoConfig").get_text_config()

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load("AutoTokenizer")

    @cached_property
    def _model(self) -> Any:
        from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

        known = type(self._config) in MODEL_FOR_TEXT_ENCODING_MAPPING  # loads the encoder alone
        loader = "AutoModelForTextEncoding" if known else "AutoModel"
        model = self._load(loader, config=self._config, dtype=torch.float32)
        return (model.get_encoder() if self._config.is_encoder_decoder else model).eval()

    def _load(self, loader: str, **options: Any) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise CinemeshError(
                f"text encoder {self.name} needs the package transformers, which is not installed: "
                "run pip install 'cinemesh[text]', or use the byte encoder"
            ) from error
        try:
            source = str(self.directory)
            return getattr(transformers, loader).from_pretrained(source, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise CinemeshError(
                f"text encoder {self.name}: transformers ({loader}) cannot read {self.directory}: {in_a_line(error)}",
                remedy="make sure that the directory is whole and its tokenizer's packages are installed",
            ) from error

    @property
    def width(self) -> int:
        """The model's hidden size."""
        return self._config.hidden_size

    @property
    def fingerprint(self) -> str:
        """A hash of every file of the directory; reads the weights once."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.directory.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.directory).as_posix()}\n".encode())
            digest.update(file_digest(path).encode())
        return f"transformers-{self.tokens}-{digest.hexdigest()[:16]}"

    def length(self, caption: str) -> int:
        """See ``TextEncoder.length``."""
        return len(self._tokenizer(caption, verbose=False)["input_ids"])

    def _fitting(self, caption: str) -> str:
        """The longest beginning, of whole characters, that has at most ``tokens``: tokens may be parts of one."""
        if self.length(caption) <= self.tokens:
            return caption
        ends = range(len(caption) + 1)
        return caption[: bisect_right(ends, self.tokens, key=lambda end: self.length(caption[:end])) - 1]

    @torch.no_grad()
    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """See ``TextEncoder.encode``. Raises CinemeshError for a caption of which the tokenizer makes no token."""
        options = {"truncation": True, "max_length": self.tokens, "return_tensors": "pt"}
        inputs = self._tokenizer(self._fitting(caption), **options)
        if not inputs["input_ids"].numel():
            raise CinemeshError(
                f"text encoder {self.name}: the tokenizer in {self.directory} makes no token of the text {caption!r}",
                remedy="write something, or save a tokenizer that adds an end token",
            )
        keys = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        states = self._model(**keys).last_hidden_state[0]  # [n, width], n <= tokens
        embeddings = torch.zeros(self.tokens, self.width)
        embeddings[: len(states)] = states
        return embeddings, torch.arange(self.tokens) < len(states)


@dataclass(frozen=True)
class EncoderSettings:
    """One encoder of a recipe: bytes of ``width``, or the Hugging Face ``directory`` if given."""

    name: Annotated[str, "the key of its embeddings; letters, digits, - and _"] = "bytes"
    tokens: Annotated[Tokens, "embeddings of every caption; a longer one is cut"] = 64
    width: Annotated[EmbeddingWidth | None, "of an embedding; with a directory: null, or the model's own"] = 64
    directory: Annotated[Path | None, "what transformers saved; default: bytes, which need no weights"] = None


def build_encoders(settings: Sequence[EncoderSettings]) -> list[TextEncoder]:
    """The encoders of a recipe, in order. Raises CinemeshError for equal names and wrong widths."""
    names = [encoder.name for encoder in settings]
    if not names or len(set(names)) != len(names):
        raise CinemeshError(f"text encoders [{', '.join(names)}]: give at least one, and no two of one name")
    encoders: list[TextEncoder] = []
    for given in settings:
        if not _NAME.fullmatch(given.name):
            raise CinemeshError(
                f"text encoder {given.name!r:.100}: parameters are called after it",
                remedy="name it by 1 to 64 letters, digits, - and _",
            )
        check_ranges(given, f"text encoder {given.name}: ")
        if given.directory is not None:
            encoder = HuggingFaceEncoder(given.directory, given.tokens, given.name)
            if given.width not in (None, encoder.width):
                raise CinemeshError(
                    f"text encoder {given.name}: width({given.width}) != {encoder.width} of the "
                    f"model in {given.directory}",
                    remedy="leave width out",
                )
            encoders.append(encoder)
        elif given.width is None:
            raise CinemeshError(f"text encoder {given.name}: a byte encoder needs a width")
        else:
            encoders.append(ByteEncoder(given.width, given.tokens, given.name))
    return encoders


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
