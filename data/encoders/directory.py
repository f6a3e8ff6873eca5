"""A text encoder in a directory that transformers saved: T5, UL2, ByT5 and their kin, CLIP's text tower, BERT.

Weights are safetensors, tokenizers files of the directory; nothing is downloaded and no code of it is run.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...errors import CinemeshError, in_a_line
from ...files import file_digest
from ...model.tae.codec import Precision
from ...parallel.ir.frozen_layers import FrozenLayers
from ...parallel.runtime.comm import Communicator
from .tower import Shapes, Tower
from .weights import WeightFiles

Reads = Literal["caption", "quoted"]
Positions = Literal["own", "stretched"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUOTED = re.compile('"([^"]*)"|“([^”]*)”')  # Movie Gen, A.1: what is to be written in the picture
SAMPLED_BYTES = 2**16  # of a file, at SAMPLES places: weights that were tuned differ nearly everywhere
SAMPLES = 64


class HuggingFaceEncoder:
    """The last hidden states of a text encoder saved by ``transformers`` in a directory.

    Of an encoder-decoder (T5, UL2, ByT5) only the encoder is loaded, of a two-tower model (CLIP) only the text tower.
    Weights are read at the first ``encode``, on the CPU, or by ``place``. ``reads``: the whole caption, or what of it
    stands in double quotes. ``positions``: stretched where ``tokens`` are more than a position table has rows.
    ``sharded``: where ranks share it, ``place`` brings a shard of the weights.
    """

    def __init__(
        self, directory: Path, tokens: int, name: str | None = None, *, dtype: Precision = "float32",
        reads: Reads = "caption", positions: Positions = "own", sharded: bool = False,
    ) -> None:  # fmt: skip
        self.directory, self.tokens, self.name = directory, tokens, name or directory.name
        self.dtype, self.reads, self.positions, self.sharded = DTYPES[dtype], reads, positions, sharded
        self._tower: Tower | None = None
        if tokens < 1:
            raise CinemeshError(f"text encoder {self.name}: tokens({tokens}) must be at least 1")
        if not (directory / "config.json").is_file():
            raise CinemeshError(
                f"text encoder {self.name}: {directory} has no config.json",
                remedy="name a directory that transformers saved (model.save_pretrained and tokenizer.save_pretrained)",
            )
        limit = getattr(self._config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            if positions == "own":
                raise CinemeshError(
                    f"text encoder {self.name}: tokens({tokens}) > {limit} positions of the model in {directory}",
                    remedy=f"set tokens to at most {limit}, or positions to stretched",
                )
            self._config.max_position_embeddings = tokens

    @cached_property
    def _config(self) -> Any:
        return self._load("AutoConfig").get_text_config()

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load("AutoTokenizer")

    def _load(self, loader: str) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise CinemeshError(
                f"text encoder {self.name} needs the package transformers, which is not installed: "
                "run pip install 'cinemesh[text]', or use the byte encoder"
            ) from error
        return self._reading(loader, lambda: getattr(transformers, loader).from_pretrained(
            str(self.directory), local_files_only=True, trust_remote_code=False
        ))  # fmt: skip

    def _reading(self, what: str, read: Any) -> Any:
        """``read()``. Raises CinemeshError for whatever transformers raises of a directory that is not whole."""
        try:
            return read()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
            raise CinemeshError(
                f"text encoder {self.name}: transformers ({what}) cannot read {self.directory}: {in_a_line(error)}",
                remedy="make sure that the directory is whole and its tokenizer's packages are installed",
            ) from error

    @property
    def width(self) -> int:
        """The model's hidden size."""
        return self._config.hidden_size

    @property
    def fingerprint(self) -> str:
        """A hash of every file of the directory, and of what else decides the embeddings; reads the weights once."""
        return self._fingerprint(file_digest)

    @property
    def identity(self) -> str:
        """As ``fingerprint``, of a file its size and some places only: what ranks compare, at every start."""
        return self._fingerprint(_sampled)

    def _fingerprint(self, digest_of: Any) -> str:
        digest = hashlib.sha256()
        for path in sorted(path for path in self.directory.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.directory).as_posix()}\n".encode())
            digest.update(digest_of(path).encode())
        chosen = ("bf16",) * (self.dtype is torch.bfloat16), ("quoted",) * (self.reads == "quoted")
        told = "".join(f"{word}-" for words in chosen for word in words)
        return f"transformers-{told}{self.tokens}-{digest.hexdigest()[:16]}"

    @property
    def layers(self) -> FrozenLayers:
        """What its weights take, and how they are gathered. Builds no weight."""
        return self._shapes.sizes(self.dtype)

    @cached_property
    def _shapes(self) -> Shapes:
        return self._reading("from_config", lambda: Shapes(self._config))

    def text(self, caption: str) -> str:
        """What of a caption it reads."""
        if self.reads == "caption":
            return caption
        return " ".join(straight or curly for straight, curly in QUOTED.findall(caption))

    def length(self, caption: str) -> int:
        """See ``TextEncoder.length``."""
        return self._length(self.text(caption))

    def unknown_share(self, caption: str) -> float:
        """See ``TextEncoder.unknown_share``. A slow tokenizer does not tell where its tokens stand: all is known."""
        unknown, text = self._tokenizer.unk_token_id, self.text(caption)
        letters = sum(map(str.isalpha, text))
        if not letters or not self._tokenizer.is_fast or unknown in (None, self._tokenizer.eos_token_id):
            return 0.0  # CLIP's unknown token is its end token: of bytes, it knows all
        told = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = zip(told["input_ids"], told["offset_mapping"], strict=True)
        return sum(sum(map(str.isalpha, text[a:b])) for token, (a, b) in spans if token == unknown) / letters

    def _length(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def _fitting(self, text: str) -> str:
        """The longest beginning, of whole characters, that has at most ``tokens``: tokens may be parts of one."""
        if self._length(text) <= self.tokens:
            return text
        ends = range(len(text) + 1)
        return text[: bisect_right(ends, self.tokens, key=lambda end: self._length(text[:end])) - 1]

    def token_ids(self, caption: str) -> list[int]:
        """At most ``tokens`` ids of what it reads of a caption, and at least one: of no text, the end token."""
        options = {"truncation": True, "max_length": self.tokens}
        ids: list[int] = self._tokenizer(self._fitting(self.text(caption)), **options)["input_ids"]
        return ids or [self._end]

    @property
    def _end(self) -> int:
        """Of a caption without text, where the tokenizer adds no token by itself."""
        known = (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        found = next((one for one in known if one is not None), None)
        if found is None:
            raise CinemeshError(
                f"text encoder {self.name}: the tokenizer in {self.directory} makes no token of a text without one, "
                "and has no end token",
                remedy="save a tokenizer that adds an end token",
            )
        return found

    def place(self, device: str, comm: Communicator | None = None) -> None:
        """Bring its weights to a device, once: all, or where it is sharded, this rank's shard.

        Raises CinemeshError for files that are not of its model.
        """
        if self._tower is None:
            self.token_ids("")  # there is an end token
            files, shared = WeightFiles.of(self.directory), comm if self.sharded else None
            options = (self.dtype, device, shared, self.positions == "stretched")
            self._tower = self._reading("from_config", lambda: Tower(self._config, files, *options))

    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """See ``TextEncoder.encode``. Raises CinemeshError as ``place`` does."""
        embeddings, mask = self.encode_all([caption])
        return embeddings[:, 0], mask[0]

    def encode_all(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See ``TextEncoder.encode_all``. Collective, where its weights are in shards."""
        self.place("cpu")
        assert self._tower is not None
        states = self._tower.encode([self.token_ids(caption) for caption in captions])
        embeddings = torch.zeros(self.tokens, len(captions), self.width, device=self._tower.device)
        mask = torch.zeros(len(captions), self.tokens, dtype=torch.bool)
        for row, of in enumerate(states):
            embeddings[: len(of), row] = of
            mask[row, : len(of)] = True
        return embeddings, mask


def _sampled(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for number in range(SAMPLES if size > SAMPLES * SAMPLED_BYTES else 1):
            file.seek(size * number // SAMPLES, os.SEEK_SET)
            digest.update(file.read(SAMPLED_BYTES if size > SAMPLES * SAMPLED_BYTES else size))
    return digest.hexdigest()
