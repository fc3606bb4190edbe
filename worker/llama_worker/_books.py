"""Books: which sequence holds which tokens, in which cells, with which checkpoints; always in agreement.

Cells, not tokens, are what the cache is short of: a shared prefix occupies its cells once. `Cells` keeps the count
that llama.cpp does not report, `Checkpoints` that of the bytes.

What is written here is a fact, or is about to be one: what must be done to the engine for it is returned as a KVOp.
Which checkpoints are taken and which go is chosen here, by what `_checkpoints` says they are worth; nothing else is:
see `_start` and `_eviction` for that.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llama_worker._cells import Cells
from llama_worker._checkpoints import (
    MOST,
    Checkpoint,
    Checkpoints,
    count_within,
    least_valuable,
    within,
)
from llama_worker._engine.base import SavedState
from llama_worker._identity import KVIdentity
from llama_worker._reach import Reach
from llama_worker._seq_ops import Clear, KVOp, Restore, Trim
from llama_worker._slot import Slot
from llama_worker._tokens import TokenIds, common_prefix


class Books:
    """Of one context. The worker thread's. `now` counts what was done: ages are differences of it."""

    def __init__(self, *, n_seq: int, n_cells: int, reach: Reach, checkpoints: Checkpoints) -> None:
        self.slots = [Slot(seq) for seq in range(n_seq)]
        self.cells = Cells(n_cells)
        self.reach = reach
        self.checkpoints = checkpoints
        self.now = 0

    # --- what they say

    @property
    def idle(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.busy]

    @property
    def evictable(self) -> int:
        """Cells that evicting every idle slot would free."""
        held = self.cells.holders()
        for slot in self.idle:
            if slot.n:
                held[slot.cells.view] -= 1
        return int(np.count_nonzero(held == 0)) - self.cells.free

    def own_cells(self, slot: Slot) -> int:
        """Cells that nobody else holds: the slot's tail."""
        return slot.n - self.cells.n_shared(slot.cells.view)

    def is_held_by_busy(self, slot: Slot) -> bool:
        """Whether a busy slot holds all that `slot` does. Sharing is by prefix: then it holds the last cell."""
        n = slot.n
        last = slot.cells.view[n - 1]
        return any(other.busy and other.n >= n and other.cells.view[n - 1] == last for other in self.slots)

    def is_held_twice(self, slot: Slot) -> bool:
        """Whether another slot holds the same tokens, be it in cells of its own."""
        others = [other for other in self.slots if other is not slot and other.kv == slot.kv]
        return any(common_prefix(other.tokens.view, slot.tokens.view) == slot.n for other in others)

    def wants_checkpoint(self, slot: Slot) -> bool:
        """Whether to save what `slot` holds now, so that it can be gone back to."""
        return self.checkpoints.has_room and slot.n >= slot.next_checkpoint

    # --- what is written in them

    def tick(self) -> int:
        self.now += 1
        return self.now

    def touch(self, slot: Slot) -> None:
        slot.last_used = self.tick()

    def extend(self, slot: Slot, tokens: TokenIds) -> None:
        """`slot` holds `tokens` as well, behind what it does."""
        if len(tokens) == 1:  # every decoding sequence, every step
            slot.cells.append(self.cells.take_one())
            slot.tokens.append(tokens[0])
            return
        slot.cells.extend(self.cells.take(len(tokens)))
        slot.tokens.extend(tokens)

    def truncate(self, slot: Slot, length: int) -> None:
        """The slot holds its first `length` tokens only."""
        self.cells.drop(slot.cells.part(length, slot.n))
        slot.cells.truncate(length)
        slot.tokens.truncate(length)
        slot.firm = min(slot.firm, length)
        if slot.pins:
            slot.pins = [held for held in slot.pins if held[1] <= length]
        if slot.checkpoints:
            kept = count_within(slot.checkpoints, length)
            self.checkpoints.let_go(slot.checkpoints[kept:])
            del slot.checkpoints[kept:]

    def go_back(self, slot: Slot, length: int) -> KVOp:
        """`slot` holds its first `length` tokens, as many as `Reach.reachable` said, which is less than it does."""
        op: KVOp
        if not length:
            op = Clear(slot.seq)
        elif self.reach.can_trim:
            op = Trim(slot.seq, length)
        else:
            op = Restore(slot.seq, length, self.checkpoint_at(slot, length).state)
        self.truncate(slot, length)
        return op

    def copy(self, donor: Slot, target: Slot, length: int) -> None:
        """The empty `target` holds the first `length` tokens of `donor`, in the same cells."""
        target.tokens.extend(donor.tokens.part(0, length))
        target.cells.extend(donor.cells.part(0, length))
        self.cells.hold(target.cells.view)
        target.firm = min(donor.firm, length)
        target.checkpoints.extend(donor.checkpoints[: count_within(donor.checkpoints, length)])
        self.checkpoints.hold(target.checkpoints)

    def fill(self, slot: Slot, tokens: TokenIds, checkpoints: Iterable[Checkpoint]) -> None:
        """The empty `slot` is restored: it holds `tokens`, with `checkpoints`, which count it as a holder already."""
        self.extend(slot, tokens)
        slot.checkpoints.extend(checkpoints)
        slot.firm = self.reach.firm_of_restored(slot.n)

    def checkpoint_at(self, slot: Slot, length: int) -> Checkpoint:
        """The checkpoint that leads to just `length` tokens, which is there; now used last."""
        checkpoint = within(slot.checkpoints, length)
        assert checkpoint is not None, f"{slot} has no checkpoint at {length}"
        assert checkpoint.length == length, f"{slot} has no checkpoint at {length}"
        checkpoint.last_used = self.now
        return checkpoint

    def keep_checkpoint(self, slot: Slot, state: SavedState) -> None:
        """`state` was saved of what `slot` holds now. Others go if there are too many bytes."""
        checkpoint = Checkpoint(slot.n, state, self.now)
        if not self.checkpoints.taken(checkpoint):
            return
        slot.checkpoints.append(checkpoint)
        self.checkpoints.hold([checkpoint])
        if len(slot.checkpoints) > MOST:
            self._drop(least_valuable([slot.checkpoints], self.now, checkpoint))
        self.thin(checkpoint)

    def thin(self, newest: Checkpoint | None = None) -> None:
        """Drop checkpoints, but not the `newest`, until they are within their budget."""
        while self.checkpoints.over_budget:
            self._drop(least_valuable([slot.checkpoints for slot in self.slots], self.now, newest))

    def _drop(self, checkpoint: Checkpoint) -> None:
        for slot in self.slots:
            if checkpoint in slot.checkpoints:
                slot.checkpoints.remove(checkpoint)
                self.checkpoints.let_go([checkpoint])
        self.checkpoints.dropped()

    # --- that they agree

    def check(self) -> None:
        """Assert that they are consistent: every held cell is counted once per holder."""
        self._check_checkpoints()
        counted = np.zeros(self.cells.n, np.int32)
        kinds: dict[int, KVIdentity] = {}
        for slot in self.slots:
            cells = slot.cells.view
            assert all(kinds.setdefault(cell, slot.kv) == slot.kv for cell in cells.tolist()), f"{slot}: others' cells"
            assert slot.n == len(cells), f"{slot}: {len(cells)} cells"
            assert 0 <= slot.firm <= slot.n, f"{slot}: firm to {slot.firm}"
            assert len(np.unique(cells)) == len(cells), f"{slot} holds a cell twice"
            counted[cells] += 1
        assert np.array_equal(counted, self.cells.holders()), "holders differ from what the slots hold"
        assert self.cells.free == int(np.count_nonzero(counted == 0)), "free cells differ"
        for slot in self.slots:
            assert (np.diff(counted[slot.cells.view]) <= 0).all(), f"{slot} shares what is no prefix"

    def _check_checkpoints(self) -> None:
        holders: dict[Checkpoint, int] = {}
        for slot in self.slots:
            places = [checkpoint.length for checkpoint in slot.checkpoints]
            assert places == sorted(set(places)), f"{slot}: checkpoints at {places}"
            assert not places or 0 < places[0] <= places[-1] <= slot.n, f"{slot}: checkpoints at {places}"
            for checkpoint in slot.checkpoints:
                holders[checkpoint] = holders.get(checkpoint, 0) + 1
        assert all(checkpoint.holders == n for checkpoint, n in holders.items()), "holders of checkpoints differ"
        n_bytes = sum(checkpoint.state.nbytes for checkpoint in holders)
        assert (self.checkpoints.n, self.checkpoints.n_bytes) == (len(holders), n_bytes), "bytes differ"
        assert not self.checkpoints.over_budget, f"{n_bytes} bytes of checkpoints"
