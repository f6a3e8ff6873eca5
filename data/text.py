"""Frozen text encoders: a caption becomes a fixed number of embeddings and a mask.

The paper uses three (UL2, MetaCLIP, ByT5; 3.1.4), each followed in the model by its own Linear and
LayerNorm. Here: bytes, which need no weights, and any encoder directory of ``transformers``.
An encoder's ``name`` is the key of its embeddings in the model, in the cache and in a batch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Protocol

import torch
from torch import Tensor

from ..errors import CinemeshError
from ..kernels.philox import Purpose, uniform
from ..model.tae.codec import Precision
from ..parallel.ir.frozen_layers import FrozenLayers
from ..parallel.runtime.comm import Communicator
from ..ranges import check_ranges, integers
from .encoders.directory import HuggingFaceEncoder, Positions, Reads

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
    sharded: bool  # ranks that share its weights hold a shard each

    @property
    def width(self) -> int:
        """Length of an embedding."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever ``encode`` would give other embeddings."""
        ...

    @property
    def identity(self) -> str:
        """As ``fingerprint``, told at once: large files are not read whole."""
        ...

    @property
    def layers(self) -> FrozenLayers | None:
        """What its weights take, and how they are gathered; None: it has none."""
        ...

    def place(self, device: str, comm: Communicator | None = None) -> None:
        """Bring its weights to a device, in shards over the ranks of ``comm`` where it is ``sharded``; once."""
        ...

    def length(self, caption: str) -> int:
        """Tokens of the whole caption; where they are more than ``tokens``, ``encode`` cuts it."""
        ...

    def unknown_share(self, caption: str) -> float:
        """Of the letters that it reads, those of which it only sees that it never learnt them, as of another script."""
        ...

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embeddings float32 [tokens, width], zero as padding; bool mask [tokens], True = valid.

        A longer caption is cut, never inside a character. At least one token is valid.
        """
        ...

    def encode_all(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The embeddings [tokens, B, width], on the device of its weights, and masks [B, tokens] of B captions.

        Each is, bit by bit, what ``encode`` makes of it. Collective, where its weights are in shards.
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
        self.name, self.width, self.tokens, self.sharded = name, width, tokens, False
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

    @property
    def identity(self) -> str:
        return self.fingerprint

    @property
    def layers(self) -> None:
        """It has no weights."""

    def place(self, device: str, comm: Communicator | None = None) -> None:
        """It has no weights."""

    def length(self, caption: str) -> int:
        """See ``TextEncoder.length``; the end token counts."""
        return len(caption.encode()) + 1

    def unknown_share(self, caption: str) -> float:
        """It knows every byte."""
        return 0.0

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """See ``TextEncoder.encode``. A cut caption keeps its end token."""
        beginning = caption.encode()[: self.tokens - 1].decode(errors="ignore")  # of a character, all bytes or none
        ids = [*beginning.encode(), END]
        embeddings = torch.zeros(self.tokens, self.width)
        embeddings[: len(ids)] = (self._table[ids] + self._position[: len(ids)]).float()
        return embeddings, torch.arange(self.tokens) < len(ids)

    def encode_all(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See ``TextEncoder.encode_all``."""
        encoded = [self.encode(caption) for caption in captions]
        return torch.stack([states for states, _ in encoded], 1), torch.stack([mask for _, mask in encoded])


@dataclass(frozen=True)
class EncoderSettings:
    """One encoder of a recipe: bytes of ``width``, or the Hugging Face ``directory`` if given."""

    name: Annotated[str, "the key of its embeddings; letters, digits, - and _"] = "bytes"
    tokens: Annotated[Tokens, "embeddings of every caption; a longer one is cut"] = 64
    width: Annotated[EmbeddingWidth | None, "of an embedding; with a directory: null, or the model's own"] = 64
    directory: Annotated[Path | None, "what transformers saved; default: bytes, which need no weights"] = None
    dtype: Annotated[Precision, "of a directory's weights and products; on GPUs, bfloat16"] = "float32"
    reads: Annotated[Reads, "the caption, or what of it stands in double quotes, as the paper's ByT5"] = "caption"
    positions: Annotated[
        Positions, "stretched: a table of fewer positions than tokens is made longer, as the paper's MetaCLIP begins"
    ] = "own"
    sharded: Annotated[
        bool, "in the loop, a directory's weights lie in shards on the ranks of dp_shard x cp, as the paper's UL2"
    ] = False


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
            encoder = HuggingFaceEncoder(
                given.directory, given.tokens, given.name,
                dtype=given.dtype, reads=given.reads, positions=given.positions, sharded=given.sharded,
            )  # fmt: skip
            if given.width not in (None, encoder.width):
                raise CinemeshError(
                    f"text encoder {given.name}: width({given.width}) != {encoder.width} of the "
                    f"model in {given.directory}",
                    remedy="leave width out",
                )
            encoders.append(encoder)
        elif given.width is None:
            raise CinemeshError(f"text encoder {given.name}: a byte encoder needs a width")
        elif (given.dtype, given.reads, given.positions, given.sharded) != ("float32", "caption", "own", False):
            raise CinemeshError(
                f"text encoder {given.name}: dtype, reads, positions and sharded are of a directory's weights",
                remedy="name its directory, or leave them out",
            )
        else:
            encoders.append(ByteEncoder(given.width, given.tokens, given.name))
    return encoders
