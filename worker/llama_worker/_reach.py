"""Reach: how far back a sequence can go, and so how much of a prompt can be had from it.

A plain KV cache is cut anywhere. A recurrent or hybrid model, and a sliding window that drops cells, cannot cut a
tail off: they go back to checkpoints (see `_checkpoints`). A window that was restored may be there only as far as it
was needed, so it is of use whole, or longer. The rules of one context; they only read what they are asked about.
"""

from __future__ import annotations

from llama_worker._checkpoints import within
from llama_worker._slot import Slot
from llama_worker._tokens import TokenIds, common_prefix


class Reach:
    """What can be done with the sequences of one context; the arguments as in `EngineLimits`. The worker thread's."""

    def __init__(self, *, can_trim: bool, can_share: bool, needs_checkpoints: bool, can_trim_restored: bool) -> None:
        self.can_trim = can_trim
        self.can_share = can_share and can_trim
        self.needs_checkpoints = needs_checkpoints
        self.can_trim_restored = can_trim_restored

    @property
    def can_copy(self) -> bool:
        """Whether a sequence of its own can be made of the beginning of another."""
        return self.can_share or self.needs_checkpoints

    @property
    def restores_whole(self) -> bool:
        """Whether a sequence that was restored can all that it could before."""
        return self.can_trim_restored or not self.can_trim

    def firm_of_restored(self, n: int) -> int:
        """To how many tokens a sequence that was restored with `n` cannot be cut."""
        return 0 if self.can_trim_restored else n

    def usable(self, slot: Slot, prompt: TokenIds) -> int:
        """How many of the first tokens of `prompt` can be had from `slot`; at most len(prompt) - 1."""
        if not slot.n:
            return 0
        length = min(common_prefix(slot.tokens.view, prompt), len(prompt) - 1)
        if length == slot.n and not slot.busy:
            return length
        return self.reachable(slot, length)

    def reachable(self, slot: Slot, length: int) -> int:
        """How many of the first `length` tokens of `slot` can be gone back to, or shared."""
        if self.can_trim:
            return length if length >= slot.firm else 0
        checkpoint = within(slot.checkpoints, length)
        return checkpoint.length if checkpoint is not None else 0
