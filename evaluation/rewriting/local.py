"""A chat model that transformers saved in a directory: loaded when it is first asked, never downloaded, no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...errors import CinemeshError, in_a_line
from ...files import file_digest
from .guideline import Message
from .settings import RewriterSettings

WEIGHT_FILES = ("*.safetensors", "*.gguf")


class LocalModel:
    """See ``rewriter.ChatModel``. Answers with the likeliest words, so that it says the same again."""

    def __init__(self, settings: RewriterSettings, directory: Path) -> None:
        self._settings, self._directory = settings, directory
        self._weights = next((path for kind in WEIGHT_FILES for path in sorted(directory.glob(kind))), None)
        if self._weights is None:
            raise CinemeshError(
                f"{directory} holds no *.safetensors and no *.gguf",
                remedy="save the model there with save_pretrained, its tokenizer too",
            )

    @property
    def identity(self) -> str:
        """Of every file of the directory."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(path for path in self._directory.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self._directory).as_posix()}\n{file_digest(path)}\n".encode())
        return f"directory {digest.hexdigest()} {self._settings.answer_tokens} tokens"

    @torch.no_grad()
    def ask(self, messages: Sequence[Message]) -> str:
        """The model's answer. Raises CinemeshError for one that is cut, and where the model cannot be loaded."""
        tokenizer, model = self._tokenizer, self._model
        if tokenizer.chat_template is None:
            text = "\n\n".join(each["content"] for each in messages) + "\n\n"
        else:
            text = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True)
        # The template writes the tokenizer's own begin and end.
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None)["input_ids"]
        ids = ids.to(model.device)
        limit = getattr(model.config, "max_position_embeddings", None)
        room = (
            self._settings.answer_tokens if limit is None else min(self._settings.answer_tokens, limit - ids.shape[1])
        )
        if room < 1:
            raise CinemeshError(
                f"guideline and prompt have {ids.shape[1]} tokens, and the model in {self._directory} takes {limit}",
                remedy="show fewer examples",
            )
        options = {"max_new_tokens": room, "max_time": self._settings.timeout_s, "do_sample": False}
        try:
            said = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=_ends(model)[0], **options)
        except RuntimeError as error:  # memory above all
            raise CinemeshError(
                f"the rewriter in {self._directory} failed: {in_a_line(error)}", remedy="take a smaller model"
            ) from error
        new = said[0, ids.shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        if not len(new) or int(new[-1]) not in _ends(model):
            raise CinemeshError(
                f"the answer is cut after {len(new)} tokens of at most {room} in {self._settings.timeout_s:g} s",
                remedy="raise answer_tokens and timeout_s, or take a model that ends",
            )
        return answer

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load("AutoTokenizer")

    @cached_property
    def _model(self) -> Any:
        dtype = torch.float32 if self._settings.device == "cpu" else torch.bfloat16
        model = self._load("AutoModelForCausalLM", dtype=dtype, use_safetensors=True)
        try:
            return model.to(self._settings.device).eval()
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
            raise CinemeshError(
                f"the rewriter's model cannot be moved to {self._settings.device}: {in_a_line(error)}",
                remedy="write device: cpu",
            ) from error

    def _load(self, loader: str, **options: Any) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise CinemeshError(
                "a rewriter in a directory needs the package transformers, which is not installed",
                remedy="run pip install 'cinemesh[rewrite]', or take an endpoint",
            ) from error
        assert self._weights is not None
        if self._weights.suffix == ".gguf":
            options = {name: value for name, value in options.items() if name != "use_safetensors"}
            options["gguf_file"] = self._weights.name
        try:
            source = str(self._directory)
            return getattr(transformers, loader).from_pretrained(source, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            raise CinemeshError(
                f"transformers ({loader}) cannot read the rewriter in {self._directory}: {in_a_line(error)}",
                remedy="make sure that the directory is whole and its tokenizer's packages are installed",
            ) from error


def _ends(model: Any) -> list[int]:
    """Tokens with which an answer ends."""
    found = model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else [*(found or [0])]
