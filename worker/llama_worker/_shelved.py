"""Shelved: a file with a saved prefix, as the index of its folder knows it."""

from __future__ import annotations

from dataclasses import dataclass

from llama_worker._identity import BASE, KVIdentity
from llama_worker._tokens import TokenIds


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Shelved:
    """A whole sequence of `tokens`, computed with `kv`; checkpoints at these numbers of them. `used`: when, in ns."""

    name: str = ""
    kv: KVIdentity = BASE
    tokens: TokenIds
    checkpoints: tuple[int, ...] = ()
    n_bytes: int = 0
    used: int = 0

    def reachable(self, length: int, *, can_trim: bool) -> int:
        """As `Entry.reachable`, of what the file holds."""
        if length == len(self.tokens) or can_trim:
            return length
        return max((at for at in self.checkpoints if at <= length), default=0)
