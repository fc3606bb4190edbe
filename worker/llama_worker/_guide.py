"""Guide: what may come next in one reply, whatever its model would like to say.

A constraint leaves some tokens and refuses the others; a budget ends the thoughts. Both look at what was said
so far, so every token of a reply goes through its guide: sampled ones by `accept`, those that must come by
`forced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llama_worker._engine.base import Mask
from llama_worker._errors import GenerationError, LlamaWorkerError


class TokenConstraint(Protocol):
    """Which tokens may follow. Its methods may raise anything; that fails the request it belongs to."""

    def mask(self) -> Mask:
        """The tokens that may come next; valid until the next call."""
        ...

    def accept(self, token: int) -> None: ...

    def forced(self) -> list[int]:
        """The tokens that must come next, already accepted; [] where there is a choice."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can come."""
        ...


class Progress(Protocol):
    """How far a reply has come."""

    @property
    def in_reasoning(self) -> bool: ...

    @property
    def n_reasoning(self) -> int: ...

    @property
    def is_whole(self) -> bool:
        """Whether no character is half said."""
        ...


class Guide:
    """One reply's guide; its constraint is no other's. Not thread-safe: prepared by a caller, used by the worker.

    `budget`: tokens that may be thought; then `closing` must come, the tokens of the tag that ends thoughts.
    `skips`: what must come is said without being sampled; else it is sampled like all else.
    """

    __slots__ = ("_budget", "_closing", "_constraint", "_ready", "_skips")

    def __init__(
        self,
        constraint: TokenConstraint | None,
        *,
        budget: int | None = None,
        closing: Sequence[int] = (),
        skips: bool = True,
    ) -> None:
        self._constraint = constraint
        self._budget = budget
        self._closing = tuple(closing)
        self._skips = skips
        self._ready: Mask | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the reply is at its end: nothing can follow."""
        return self._constraint is not None and self._constraint.is_complete

    def prepare(self) -> None:
        """Compute the next mask now, for whoever asks for it next. Raises GenerationError."""
        self._ready = self.mask()

    def mask(self) -> Mask | None:
        """The tokens that may come next; None for all. Raises GenerationError."""
        if self._constraint is None:
            return None
        if self._ready is not None:
            ready, self._ready = self._ready, None
            return ready
        try:
            return self._constraint.mask()
        except Exception as exc:
            raise _failed(exc) from exc

    def accept(self, token: int) -> None:
        """`token` was sampled. Raises GenerationError."""
        self._ready = None
        if self._constraint is None:
            return
        try:
            self._constraint.accept(token)
        except Exception as exc:
            raise _failed(exc) from exc

    def forced(self, reply: Progress) -> Sequence[int]:
        """What must come next, accepted already; empty where there is a choice. Raises GenerationError."""
        if self._is_thought_out(reply):
            for token in self._closing:
                self.accept(token)
            return self._closing
        if self._constraint is None or not self._skips:
            return ()
        try:
            return self._constraint.forced()
        except Exception as exc:
            raise _failed(exc) from exc

    def _is_thought_out(self, reply: Progress) -> bool:
        """A tag in the midst of a character would be no text, so that one may be finished."""
        return self._budget is not None and reply.in_reasoning and reply.n_reasoning >= self._budget and reply.is_whole


def _failed(error: Exception) -> LlamaWorkerError:
    """What is wrong with a constraint is its own request's affair. Messages of strangers may hold text."""
    if isinstance(error, LlamaWorkerError):
        return error
    return GenerationError(f"the constraint of the reply failed ({type(error).__name__}); loosen the schema or grammar")
