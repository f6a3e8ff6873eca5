"""From a user's prompt to one like the captions of training, or to the user's own with the reason (torch-free).

What a model answers is held to the rules, and asked for once more with what was wrong; what passes is kept in a folder
under the digest of model, guideline and prompt. A prompt that was rewritten once is rewritten so for ever, whether its
endpoint still stands or not, so that a clip can be sampled again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from ...documents import exactly, read_json
from ...errors import CinemeshError
from ...files import atomic_file
from .endpoint import Endpoint, Unreached
from .guideline import ASSISTANT, USER, Message, Parts, message, read_guideline, read_parts
from .rules import MOST_SIGNS, broken_rules, read_answer
from .settings import RewriterSettings

MOST_UNREACHED = 3  # prompts in a row for which no answer came, after which none is waited for
PAUSE_S = 1.0  # before an endpoint is asked again that did not answer
AGAIN = "That is refused: {}. Write the JSON object again, and nothing else."
REMOVE = "remove the file: the prompt is then asked for again"


class ChatModel(Protocol):
    """What answers messages."""

    @property
    def identity(self) -> str:
        """Changes wherever answers could: model, weights, what else is asked of it."""
        ...

    def ask(self, messages: Sequence[Message]) -> str:
        """Its answer. Raises CinemeshError where none comes that could be one."""
        ...


@dataclass(frozen=True)
class Rewritten:
    """Of a prompt: the parts, or the ``problem`` for which it stays as it is. ``cached``: nobody was asked."""

    prompt: str
    parts: Parts | None
    problem: str = ""
    cached: bool = False

    @property
    def text(self) -> str:
        """What is sampled."""
        return self.prompt if self.parts is None else self.parts.text


def chat_model(settings: RewriterSettings) -> ChatModel:
    """The model of the settings. Raises CinemeshError for a directory without one."""
    if settings.directory is None:
        return Endpoint(settings)
    from .local import LocalModel  # torch loads with it

    return LocalModel(settings, Path(settings.directory))


class Rewriter:
    """Rewrites prompts with one model under one guideline."""

    def __init__(self, settings: RewriterSettings, model: ChatModel | None = None) -> None:
        self.settings, self.guideline = settings, read_guideline(settings.guideline)
        self._model = model or chat_model(settings)
        self._unreached = 0

    @property
    def identity(self) -> str:
        """Changes wherever a rewritten prompt could."""
        told = [self._model.identity, self.guideline.digest, self.settings.examples]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def answer(self, prompt: str) -> str:
        """What the model answers first, unread. Raises CinemeshError where it does not."""
        return self._model.ask(self.guideline.messages(prompt, self.settings.examples))

    def rewrite(self, prompt: str) -> Rewritten:
        """The prompt as the model writes it, or as it is, and why. Raises CinemeshError for a damaged cache alone."""
        if not prompt.strip():
            return Rewritten(prompt, None, "it is empty")
        if (count := len(prompt.split())) > self.guideline.words[1]:
            return Rewritten(prompt, None, f"it has {count} words, more than a rewritten one may have")
        kept = Path(self.settings.cache) / f"{self._key(prompt)}.json"
        if kept.exists():
            return Rewritten(prompt, _kept(kept, prompt), cached=True)
        if self._unreached >= MOST_UNREACHED:
            return Rewritten(prompt, None, f"nobody answered to {MOST_UNREACHED} prompts before, and none is asked now")
        parts, problem = self._asked(prompt)
        if parts is not None:
            told = {"model": self.settings.model, "guideline": self.settings.guideline, "prompt": prompt}
            with atomic_file(kept) as unfinished:
                text = json.dumps(told | {"parts": asdict(parts)}, indent=1, ensure_ascii=False)
                unfinished.write_text(text + "\n", encoding="utf-8")
        return Rewritten(prompt, parts, problem)

    def _asked(self, prompt: str) -> tuple[Parts | None, str]:
        """The parts, or what was wrong in the end."""
        first = self.guideline.messages(prompt, self.settings.examples)
        messages, problem, reached = first, "", False
        for number in range(self.settings.tries):
            try:
                answer = self._model.ask(messages)
            except Unreached as error:
                problem = f"no answer came: {error}"
                if number + 1 < self.settings.tries:
                    time.sleep(PAUSE_S)
                continue
            except CinemeshError as error:
                problem, reached = f"no answer: {error}", True
                continue
            reached = True
            try:
                parts = read_answer(answer, self.guideline)
                broken = broken_rules(prompt, parts, self.guideline)
            except CinemeshError as error:
                broken = {"form": error.problem}
            else:
                if not broken:
                    self._unreached = 0
                    return parts, ""
            said = "; ".join(broken.values())
            problem = f"the answer is refused: {said}"
            messages = [*first, message(ASSISTANT, answer[:MOST_SIGNS]), message(USER, AGAIN.format(said))]
        self._unreached = 0 if reached else self._unreached + 1
        return None, problem

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.identity, prompt]).encode()).hexdigest()


def _kept(path: Path, prompt: str) -> Parts:
    """What the cache holds of a prompt. Raises CinemeshError where that is not what was written."""
    what = f"the kept rewrite {path}"
    kinds = {"model": str, "guideline": str, "prompt": str, "parts": dict}
    found = exactly(read_json(path, "the kept rewrite", REMOVE), what, kinds, remedy=REMOVE)
    if found["prompt"] != prompt:
        raise CinemeshError(f"{what} is of another prompt", remedy=REMOVE)
    return read_parts(found["parts"], what, REMOVE)
