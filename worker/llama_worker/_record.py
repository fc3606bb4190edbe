"""Record: what is measured of one request, from its first slot to its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from llama_worker._events import Finished, FinishReason, Terminal, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a request ended: for a `reason`, by an `error`, or, texts that were embedded, by neither.

    `texts` is how many were to be embedded; None for a generation.
    """

    usage: Usage
    reason: FinishReason | None = None
    error: BaseException | None = None
    texts: int | None = None

    @classmethod
    def of(cls, event: Terminal) -> Answer:
        if isinstance(event, Finished):
            return cls(usage=event.usage, reason=event.reason)
        return cls(usage=event.usage, error=event.error)


class Record:
    """What is measured of one request; moments in seconds of the worker's clock. Written by the worker thread.

    `first_token` and `last_token` are when rows were decoded whose logits are sampled, `n_tokens` how many.
    Who listens hears of the answer just before the caller can; it may neither block nor raise.
    """

    __slots__ = ("_answered", "_listeners", "begun", "first_token", "last_token", "n_tokens")

    def __init__(self, *listeners: Listener) -> None:
        self.begun: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.n_tokens = 0
        self._listeners = listeners
        self._answered = False

    @property
    def inter_token(self) -> float | None:
        """The mean time from one token to the next; None when there were fewer than two."""
        if self.first_token is None or self.last_token is None or self.n_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.n_tokens - 1)

    def end(self, answer: Answer) -> None:
        """The request is about to be answered. Said twice, the first counts, as it does for who reads it."""
        if not self._answered:
            self._answered = True
            for listener in self._listeners:
                listener(answer, self)


Listener: TypeAlias = Callable[[Answer, Record], object]
