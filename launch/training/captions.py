"""Captions of a run that encodes them in its loop: by all ranks, between two steps, for the steps that come next.

Weights of an encoder that is in shards are gathered once a turn, so a turn takes the captions of several steps
(``data.embedding_steps``). What a caption becomes is the same in any turn, on any rank: see ``data/encoders/tower.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...data.cache.history import History
from ...data.encoding import Encoding
from ...model.inputs import MASK
from ...parallel.runtime.comm import Communicator
from ..cluster.processes import Joined
from .checkpoint.together import together
from .recipe import Config

CHECKED = 10_000  # captions whose tokens are counted at the start, in some seconds: a set may have 10^8

TextInputs = dict[str, Tensor]


def encoded_in_loop(config: Config) -> bool:
    return config.data.embeddings == "loop"


def loop_encoding(config: Config, encoding: Encoding) -> Encoding | None:
    """What encodes captions while the run goes on; None: they were encoded before."""
    return encoding if encoded_in_loop(config) else None


def cache_encoding(config: Config, encoding: Encoding) -> Encoding:
    """What makes the latent cache: without embeddings, where captions are encoded in the loop."""
    return encoding.without_text if encoded_in_loop(config) else encoding


def told_losses(config: Config, encoding: Encoding, history: History, step: int) -> list[str]:
    """What encoders cut or do not know of the captions, or of the first ``CHECKED``, that a step draws from; in lines.

    Of a run that does not encode them none: who built the cache said it.
    """
    if not encoded_in_loop(config):
        return []
    captions, number = history.at(step).first_captions(CHECKED)
    said = "" if len(captions) == number else f" (of {number:,}, the first are counted)"
    return [f"{loss}{said}" for loss in (*encoding.cuts(captions), *encoding.unknown(captions))]


def contents(config: Config, encoding: Encoding, history: History, until: int | None = None) -> str:
    """What decides the samples of the steps before ``until``: the cache's versions, and encoders that run beside it."""
    told = history.text(until)
    if not encoded_in_loop(config):
        return told
    return ", ".join([told, *(f"{encoder.name} {encoder.identity}" for encoder in encoding.encoders)])


def place_encoders(config: Config, encoding: Encoding, place: Joined, comm: Communicator | None) -> None:
    """Bring their weights to the run's device, where captions are encoded in the loop. Collective.

    Raises CinemeshError, on every rank, for a directory that one of them cannot read.
    """
    if encoded_in_loop(config):
        together(place.mesh, lambda: encoding.place(place.device, comm))


class TextAhead:
    """The text of one data rank's samples, a turn of steps ahead, by ``encoding``; without it the cache has the text.

    ``captions`` of a step, by micro-batch.
    """

    def __init__(self, config: Config, encoding: Encoding | None, captions: Callable[[int], list[list[str]]]) -> None:
        self._config, self._encoding, self._captions = config, encoding, captions
        self._read: dict[int, list[list[str]]] = {}  # captions of steps that are to be encoded
        self._ready: dict[int, list[TextInputs]] = {}

    def read(self, step: int) -> None:
        """Captions of the turn of steps that begins with ``step``, unless it is there.

        Raises CinemeshError for an index that cannot be read.
        """
        steps, every = self._config.schedule.steps, self._config.data.embedding_steps
        if self._encoding is None or step in self._ready or step >= steps:
            return
        self._read = {at: self._captions(at) for at in range(step, min((step // every + 1) * every, steps))}

    def encode(self) -> None:
        """What was read last, if anything. Collective."""
        if self._encoding is None or not self._read:
            return
        counts = [(at, len(part)) for at, parts in self._read.items() for part in parts]
        text = self._encoding.captions([caption for parts in self._read.values() for part in parts for caption in part])
        first = 0
        for at, count in counts:
            self._ready.setdefault(at, []).append(_part(text, first, first + count))
            first += count
        self._read = {}

    def take(self, step: int) -> list[TextInputs]:
        """Of each micro-batch of a step that was encoded; it is forgotten."""
        if self._encoding is None:
            return [{}] * self._config.plan.micro_batches
        for passed in [at for at in self._ready if at < step]:
            del self._ready[passed]
        return self._ready[step]


def _part(text: TextInputs, first: int, last: int) -> TextInputs:
    return {name: value[first:last] if name == MASK else value[:, first:last] for name, value in text.items()}
