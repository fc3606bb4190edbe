"""Entry: a sequence as bytes, in RAM, wherever it comes from: a slot, a file or another process."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_worker._checkpoints import Checkpoint, within
from llama_worker._engine.base import SavedState
from llama_worker._identity import BASE, KVIdentity
from llama_worker._saved_prefix import SavedPrefix
from llama_worker._tokens import TokenIds, common_prefix

WORTH_SAVING = 128
"""Fewer tokens are decoded again as quickly."""


@dataclass(slots=True, eq=False, repr=False)
class Entry:
    """A sequence of `tokens`, whole, computed with `kv`; `checkpoints`, in order, are places in it.

    `continued`: see `Save`.
    """

    tokens: TokenIds
    state: SavedState
    checkpoints: tuple[Checkpoint, ...]
    last_used: int
    kv: KVIdentity = BASE
    continued: bool | None = None
    n_hits: int = field(default=0, init=False)
    n_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        n_bytes = self.state.nbytes + self.tokens.nbytes
        self.n_bytes = n_bytes + sum(checkpoint.state.nbytes for checkpoint in self.checkpoints)

    @property
    def n(self) -> int:
        return len(self.tokens)

    def reachable(self, length: int, *, can_trim: bool) -> int:
        """How many of its first `length` tokens can be had: all with `can_trim`, otherwise whole or to a checkpoint."""
        if length == self.n or can_trim:
            return length
        checkpoint = within(self.checkpoints, length)
        return checkpoint.length if checkpoint is not None else 0

    def leads_to_all(self, tokens: TokenIds, *, can_trim: bool) -> bool:
        """Whether all of `tokens`, and nothing behind them, can be had from it."""
        n = len(tokens)
        return common_prefix(self.tokens, tokens) == n and self.reachable(n, can_trim=can_trim) == n

    def __repr__(self) -> str:
        return f"<Entry of {self.n} tokens: {self.n_bytes} bytes>"


def saved_prefix(entry: Entry, fingerprint: bytes) -> SavedPrefix:
    """`entry` as it leaves the process: of the model that `fingerprint` names."""
    checkpoints = tuple((checkpoint.length, checkpoint.state) for checkpoint in entry.checkpoints)
    return SavedPrefix(fingerprint, entry.tokens, entry.state, checkpoints, entry.kv)


def entry_of(saved: SavedPrefix) -> Entry:
    """What `saved_prefix` was made of."""
    checkpoints = tuple(Checkpoint(length, state, 0) for length, state in saved.checkpoints)
    return Entry(saved.tokens, saved.state, checkpoints, 0, saved.kv)
