"""EmbedQueue: texts of many requests, packed into batches of like length.

Texts of one batch share the pass over the weights, but attention inside a batch grows with the square of
its rows; so batches are filled up to a point only, with texts as equal in length as can be had. The longest text
of each request in turn begins a batch, so one of ten thousand texts does not hold up one of a single text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from llama_worker._commands import Embed
from llama_worker._engine.base import EngineLimits, Floats
from llama_worker._errors import copy_of
from llama_worker._tokens import TokenIds

WELL_FILLED = 256
"""Tokens in a batch beyond which attention costs more than sharing the weights saves (MiniLM on a CPU:
128 to 384 within 10 %, 64 half as fast, 1024 slower by 13 % and 2048 by 34 %)."""

CANDIDATES = 512
"""So many texts, the longest of the oldest requests, are looked at for one batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One text of one request, not embedded yet."""

    command: Embed
    index: int
    tokens: TokenIds


@dataclass(slots=True, eq=False)
class _Progress:
    vectors: list[list[float] | None]
    left: list[Text] = field(default_factory=list)
    begun: bool = False


class EmbedQueue:
    """The embedding requests of one engine, in the order of their turns. The worker thread's."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._progress: dict[Embed, _Progress] = {}

    def __bool__(self) -> bool:
        return bool(self._progress)

    def __len__(self) -> int:
        return len(self._progress)

    @property
    def has_room(self) -> bool:
        """Whether to take another request from the channel: as many as can share a batch."""
        return len(self._progress) < self._limits.n_embed_seq

    @property
    def has_begun(self) -> bool:
        return bool(self.begun())

    def begun(self) -> list[Embed]:
        """The requests of which something is embedded already."""
        return [command for command, progress in self._progress.items() if progress.begun]

    def requests(self) -> list[Embed]:
        return list(self._progress)

    def add(self, command: Embed) -> None:
        texts = [Text(command, i, tokens) for i, tokens in enumerate(command.job.texts)]
        texts.sort(key=lambda text: -len(text.tokens))
        self._progress[command] = _Progress([None] * len(texts), texts)
        self._answer_if_complete(command)

    def remove(self, command: Embed) -> None:
        """The request was answered otherwise."""
        self._progress.pop(command, None)

    def next_batch(self, *, newcomers: bool = True) -> list[Text]:
        """What to embed now; empty when there is nothing. Changes nothing but who has begun.

        Without `newcomers` only texts of requests that have begun.
        """
        served = [progress.left for progress in self._progress.values() if newcomers or progress.begun]
        texts = list(islice(chain.from_iterable(served), CANDIDATES))
        if not texts:
            return []
        batch = pack(texts, min(WELL_FILLED, self._limits.n_embed_tokens), self._limits.n_embed_seq)
        for text in batch:
            self._progress[text.command].begun = True
        return batch

    def commit(self, batch: Sequence[Text], vectors: Floats) -> None:
        """`vectors[i]` is the embedding of `batch[i]`. Answers the requests that are complete."""
        scaled = normalized(vectors)
        for text, plain, unit in zip(batch, vectors, scaled, strict=True):
            progress = self._progress[text.command]
            progress.vectors[text.index] = (unit if text.command.job.request.normalize else plain).tolist()
            progress.left.remove(text)
        self._progress[batch[0].command] = self._progress.pop(batch[0].command)  # it led, so others are before it now
        for command in {id(text.command): text.command for text in batch}.values():
            self._answer_if_complete(command)

    def fail(self, batch: Sequence[Text], error: Exception) -> None:
        """The engine failed this batch: so do the requests that have a text in it."""
        for command in {id(text.command): text.command for text in batch}.values():
            command.fail(copy_of(error))
            self.remove(command)

    def _answer_if_complete(self, command: Embed) -> None:
        progress = self._progress[command]
        if not progress.left:
            command.succeed(progress.vectors)
            self.remove(command)


def pack(texts: Sequence[Text], n_tokens: int, n_texts: int) -> list[Text]:
    """The batch that begins with the longest text of the oldest request, filled with the next shorter ones.

    `texts` are ordered by the age of their request. Pure; at least one text is taken.
    """
    oldest = texts[0].command
    first = max((text for text in texts if text.command is oldest), key=lambda text: len(text.tokens))
    rest = sorted((text for text in texts if text is not first), key=lambda text: -len(text.tokens))
    batch, room = [first], n_tokens - len(first.tokens)
    for text in rest:
        if len(batch) == n_texts:
            break
        if len(text.tokens) <= min(room, len(first.tokens)):
            batch.append(text)
            room -= len(text.tokens)
    return batch


def normalized(vectors: Floats) -> Floats:
    """Each row scaled to length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1.0, lengths)).astype(np.float32)
