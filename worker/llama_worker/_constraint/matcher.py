"""Constraint: how far one reply has come in its grammar, and which tokens may follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from llama_worker._constraint.validation import Checks
from llama_worker._engine.base import Mask
from llama_worker._errors import GenerationError

_MOST_FORCED: Final = 512  # tokens at once; a grammar may force any number


class Constraint:
    """Belongs to one generation, and to one thread at a time; it may be handed from thread to thread.

    After GenerationError it is of no more use. `checks` is what the grammar does not see to.
    """

    __slots__ = ("_ahead", "_current", "_mask", "_matcher", "_n_bytes", "_words", "checks", "field")

    def __init__(
        self,
        matcher: LLMatcher,
        n_tokens: int,
        *,
        checks: Checks,
        ahead: Sequence[int],
        words: NDArray[np.uint32] | None,
        field: str = "the grammar",
    ) -> None:
        """`ahead`: tokens that `matcher` has accepted and the reply has not; `words`: its mask after them.

        `field` is where the caller said what the reply must be, for errors.
        """
        self.checks = checks
        self.field = field
        self._matcher = matcher
        self._ahead = list(ahead)
        self._words = np.zeros((n_tokens + 31) // 32, np.uint32) if words is None else words.copy()
        self._mask: Mask = self._words.view(np.uint8)[: (n_tokens + 7) // 8]
        self._current = words is not None

    def mask(self) -> Mask:
        """The tokens that may follow, as packed bits: bit i of byte j is token 8j+i. Valid until `accept`.

        Shape ((n_vocab + 7) // 8,). Microseconds, at times some milliseconds. Raises GenerationError.
        """
        if self._ahead:
            only = np.zeros(len(self._mask), np.uint8)
            only[self._ahead[0] >> 3] = 1 << (self._ahead[0] & 7)
            return only
        if not self._current:
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            self._require_sound()
            self._current = True
        return self._mask

    def accept(self, token: int) -> None:
        """`token` follows. Raises GenerationError if it must not."""
        if self._ahead:
            if token != self._ahead.pop(0):
                raise GenerationError(f"token {token} is not what the grammar of this reply forces")
            return
        self._current = False
        if not self._matcher.consume_token(token):
            raise GenerationError(f"token {token} does not fit the grammar of this reply ({self.field}){self._error()}")

    def forced(self) -> list[int]:
        """The tokens that must follow now, in order; they count as accepted. Often none. Raises GenerationError."""
        tokens, self._ahead = self._ahead, []
        if not tokens and not self.is_complete:
            tokens = forced_tokens(self._matcher)
            self._current = self._current and not tokens
        self._require_sound()
        return tokens

    @property
    def is_complete(self) -> bool:
        """Whether the reply is whole and nothing but its end can follow."""
        return not self._ahead and self._matcher.is_stopped() and not self._matcher.is_error()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(
                f"{self.field} is too complex to be followed any further; make it simpler{self._error()}"
            )

    def _error(self) -> str:
        # Its first line; what comes after may quote the schema.
        return f": {self._matcher.get_error().partition(chr(10))[0][:200]}" if self._matcher.is_error() else ""


def forced_tokens(matcher: LLMatcher) -> list[int]:
    """What must follow; `matcher` has accepted it."""
    tokens = matcher.compute_ff_tokens()[:_MOST_FORCED]
    if tokens:
        matcher.consume_tokens(tokens)
    return tokens
