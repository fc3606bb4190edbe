"""Slot: a place, which outlives requests: one llama.cpp seq_id and the tokens whose KV it holds."""

from __future__ import annotations

from llama_worker._checkpoints import WORTH_KEEPING, Checkpoint
from llama_worker._identity import BASE
from llama_worker._pins import Pin
from llama_worker._tokens import TokenBuffer


class Slot:
    """One sequence and the tokens that it holds. `busy` while a generation has it.

    `checkpoints`, in order, are places in these tokens that the sequence can go back to. It cannot be trimmed to
    less than `firm` tokens: of what was restored, a window may be there only as far as it was needed.
    `kv`: what its tokens were computed with; of no meaning while it is empty. `session` used it last; `pins` say how
    many of its first tokens whose sessions want to be kept. `continued`: a prompt took over what it holds.
    `saved_at`: what `last_used` was when it was saved.
    """

    __slots__ = (
        "busy",
        "cells",
        "checkpoints",
        "continued",
        "firm",
        "kv",
        "last_used",
        "pins",
        "saved_at",
        "seq",
        "session",
        "tokens",
    )

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self.tokens = TokenBuffer()
        self.cells = TokenBuffer()
        self.checkpoints: list[Checkpoint] = []
        self.firm = 0
        self.kv = BASE
        self.busy = False
        self.last_used = 0
        self.session: str | None = None
        self.pins: list[tuple[Pin, int]] = []
        self.continued = False
        self.saved_at: int | None = None

    @property
    def n(self) -> int:
        return self.tokens.n

    @property
    def next_checkpoint(self) -> int:
        """How many tokens it holds before another checkpoint is worth its while."""
        return WORTH_KEEPING + (self.checkpoints[-1].length if self.checkpoints else 0)

    @property
    def pinned(self) -> int:
        """How many of its first tokens some session wants to be kept."""
        return max((length for pin, length in self.pins if not pin.released), default=0)

    def __repr__(self) -> str:
        return f"<Slot {self.seq}: {self.n} tokens, {'busy' if self.busy else 'idle'}>"
