"""FakeSampler: what the fake model says next, where its tokens do not decide it."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

from llama_worker.testing._tokenizer import IM_END

CLOSING = (IM_END, *b'"}])>')
"""Tokens that close what may be open: a reply, a text, a value."""


@dataclass(slots=True, eq=False)
class FakeSampler:
    """Deals out a scripted reply byte by byte, or takes the likeliest token.

    Under a mask it deals out the next scripted byte that is allowed and drops those before it, so a script may be
    looser than a grammar: blanks that it does not take are left out. Where no byte of it is allowed it waits:
    the reply ends if it may, else something is closed that is open, else the first token comes.
    """

    script: deque[int] | None
    ignore_eos: bool
    closed: bool = False

    def accept(self, token: int) -> None:
        """A token came without being sampled: the script goes on behind it."""
        if self.script and self.script[0] == token:
            self.script.popleft()

    def next_of(self, allowed: frozenset[int]) -> int:
        """The next scripted token that is allowed."""
        script = self.script or ()
        for skipped, token in enumerate(script):
            if token in allowed:
                self.script = deque(itertools.islice(script, skipped + 1, None))
                return token
        return next((token for token in CLOSING if token in allowed), min(allowed))

    def close(self) -> None:
        self.closed = True
