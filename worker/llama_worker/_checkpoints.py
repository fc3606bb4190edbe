"""Checkpoints: states that a sequence can go back to, for models that cannot cut a sequence's tail off.

A recurrent or hybrid model, and a sliding window that drops cells, know only what they hold now. So at stable
places of a prompt (see `_boundaries`) what cannot be cut back is saved, and the sequence can return there. That
is of use only together with the other cells of the same tokens: a checkpoint belongs to the slots that hold
them, several if they share them, and goes with the last one that gives them up.

They are kept within a budget of bytes. The one that goes first is the one whose loss costs least: few tokens
since the checkpoint before it, few slots that hold it, not used for long.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llama_worker._engine.base import SavedState

WORTH_KEEPING = 64
"""Tokens since the checkpoint before: fewer are decoded again as quickly. A prompt is cut where one is taken, and
llama.cpp attends to a long history for 64 rows at once in less time than for 32 (CPU, 0.3.36: flash attention is
computed in tiles of 64 rows, or row by row)."""

MOST = 32
"""Checkpoints of one sequence."""


class Checkpoint:
    """The state of the first `length` tokens of those who hold it."""

    __slots__ = ("holders", "last_used", "length", "state")

    def __init__(self, length: int, state: SavedState, now: int) -> None:
        self.length = length
        self.state = state
        self.last_used = now
        self.holders = 0

    def __repr__(self) -> str:
        return f"<Checkpoint at {self.length}: {self.state.nbytes} bytes, {self.holders} holders>"


@dataclass(frozen=True, slots=True)
class CheckpointCounts:
    """What the checkpoints were good for. Replaced as a whole: any thread may look.

    `taken` were saved, `dropped` of them for the budget's sake; `hits` times one was gone back to, which saved
    `restored_tokens`; `failed` could not be saved or restored.
    """

    taken: int = 0
    dropped: int = 0
    hits: int = 0
    restored_tokens: int = 0
    failed: int = 0


class Checkpoints:
    """All checkpoints of one context: how many bytes they are, and which is worth least. The worker thread's."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.n = 0
        self.n_bytes = 0
        self.counts = CheckpointCounts()
        self._largest = 0

    @property
    def has_room(self) -> bool:
        """Whether one more can be kept, be it for an older one; learnt from what they take."""
        return self.budget > 0 and self._largest <= self.budget

    def taken(self, checkpoint: Checkpoint) -> bool:
        """Note that it was saved. False when it alone is more than all may be."""
        self._largest = max(self._largest, checkpoint.state.nbytes)
        self.counts = replace(self.counts, taken=self.counts.taken + 1)
        return self.has_room

    def hit(self, n_tokens: int) -> None:
        """One was gone back to, for a prompt that begins with its `n_tokens`."""
        counts = self.counts
        self.counts = replace(counts, hits=counts.hits + 1, restored_tokens=counts.restored_tokens + n_tokens)

    def failed(self) -> None:
        self.counts = replace(self.counts, failed=self.counts.failed + 1)

    def hold(self, checkpoints: Iterable[Checkpoint]) -> None:
        """One more slot holds them."""
        for checkpoint in checkpoints:
            if not checkpoint.holders:
                self.n += 1
                self.n_bytes += checkpoint.state.nbytes
            checkpoint.holders += 1

    def let_go(self, checkpoints: Iterable[Checkpoint]) -> None:
        """One slot less holds them."""
        for checkpoint in checkpoints:
            checkpoint.holders -= 1
            if not checkpoint.holders:
                self.n -= 1
                self.n_bytes -= checkpoint.state.nbytes

    @property
    def over_budget(self) -> bool:
        return self.n_bytes > self.budget

    def dropped(self) -> None:
        self.counts = replace(self.counts, dropped=self.counts.dropped + 1)


def within(checkpoints: Sequence[Checkpoint], length: int) -> Checkpoint | None:
    """The last of `checkpoints`, which are in order, that lies within the first `length` tokens."""
    count = count_within(checkpoints, length)
    return checkpoints[count - 1] if count else None


def count_within(checkpoints: Sequence[Checkpoint], length: int) -> int:
    return bisect_right(checkpoints, length, key=lambda checkpoint: checkpoint.length)


def least_valuable(rows: Iterable[Sequence[Checkpoint]], now: int, sparing: Checkpoint | None) -> Checkpoint:
    """Of all checkpoints but `sparing`, slot by slot and in order, the one whose loss costs least."""

    def values() -> Iterable[tuple[float, Checkpoint]]:
        for row in rows:
            before = 0
            for checkpoint in row:
                age = 1 + now - checkpoint.last_used
                if checkpoint is not sparing:
                    yield (checkpoint.length - before) * checkpoint.holders / age, checkpoint
                before = checkpoint.length

    return min(values(), key=lambda valued: valued[0])[1]
