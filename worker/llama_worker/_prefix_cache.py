"""Which sequence holds which tokens, and which of them a new prompt may start from.

A Slot is a place: one llama.cpp seq_id and the tokens whose KV it holds. It outlives requests, so prefix
reuse is the question which slot already holds most of a prompt. The answers stand in `_start`, in the order in which
they are tried; who makes room, in `_eviction`; how far back a sequence can go, in `_reach`. These decide and change
nothing. `_books` says who holds what and decides only which checkpoints that is worth. The PrefixCache asks the former
and writes into the latter.

Everything here is bookkeeping. What must be done to the engine is returned as KVOps, in order, and the
books already say that it was done: a decision changes the state it was decided from, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from llama_worker._books import Books
from llama_worker._checkpoints import Checkpoints
from llama_worker._engine.base import SavedState
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._eviction import cheapest_cut, cheapest_idle
from llama_worker._identity import BASE, KVIdentity
from llama_worker._loan import Aside, Loan
from llama_worker._pins import Pin
from llama_worker._ram_tier import RamTier
from llama_worker._reach import Reach
from llama_worker._seq_ops import Clear, KVOp, Restore, Save, Share
from llama_worker._slot import Slot
from llama_worker._start import WORTH_SHARING, Copy, Recall, TakeOver, best_start, can_recall, longest_held
from llama_worker._tokens import TokenIds

_UNKNOWN = np.array([-1], np.int32)
"""Stands for the next token of a prompt of which only the beginning is known."""


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What the cache was asked for and gave up so far. Replaced as a whole: any thread may look."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    evictions: int = 0
    evicted_tokens: int = 0

    def with_loan(self, prompt: int, reused: int) -> CacheCounts:
        return replace(self, prompt_tokens=self.prompt_tokens + prompt, reused_tokens=self.reused_tokens + reused)

    def with_eviction(self, tokens: int) -> CacheCounts:
        return replace(self, evictions=self.evictions + 1, evicted_tokens=self.evicted_tokens + tokens)


class PrefixCache:
    """All slots of one context. Used by the worker thread only."""

    def __init__(
        self,
        *,
        n_seq: int,
        n_cells: int,
        can_trim: bool,
        can_share: bool,
        needs_checkpoints: bool = False,
        can_save: bool = False,
        can_trim_restored: bool = False,
        budget: int = 0,
    ) -> None:
        self.reach = Reach(
            can_trim=can_trim,
            can_share=can_share,
            needs_checkpoints=needs_checkpoints,
            can_trim_restored=can_trim_restored,
        )
        self.checkpoints = Checkpoints(budget if needs_checkpoints else 0)
        self.tier = RamTier(budget if can_save else 0, self.checkpoints, can_trim=can_trim_restored)
        self._books = Books(n_seq=n_seq, n_cells=n_cells, reach=self.reach, checkpoints=self.checkpoints)
        self.slots, self.cells = self._books.slots, self._books.cells
        self.counts = CacheCounts()

    def __repr__(self) -> str:
        n_idle = len(self._books.idle)
        return f"<PrefixCache {len(self.slots) - n_idle} busy, {n_idle} idle | {self.cells.used}/{self.cells.n} cells>"

    # --- for prompts

    @property
    def has_idle(self) -> bool:
        return any(not slot.busy for slot in self.slots)

    @property
    def evictable(self) -> int:
        """Cells that evicting every idle slot would free."""
        return self._books.evictable

    def match(self, prompt: TokenIds, session: str | None = None, *, kv: KVIdentity = BASE) -> tuple[Slot | None, int]:
        """The slot that holds the longest usable prefix of `prompt`, computed with `kv`, and that prefix's length.

        Of equal ones an idle one, and of these the one that `session` used last. At least one token of a prompt is
        always decoded, so the length is at most len(prompt) - 1.
        """
        return longest_held(self._books, prompt, session, kv)

    def kept_of(self, prompt: TokenIds, kv: KVIdentity) -> int:
        """How many of the first tokens of `prompt`, with `kv`, a slot or the tier leads to; at most all but one."""
        return max(self.match(prompt, kv=kv)[1], self.tier.find(prompt, kv)[1])

    def lend(
        self,
        prompt: TokenIds,
        session: str | None = None,
        *,
        goes_on: bool = False,
        kv: KVIdentity = BASE,
        fetched: Entry | None = None,
    ) -> Loan:
        """An idle slot for `prompt` and `kv`, now busy. The caller has seen `has_idle`. Modifies the books.

        `goes_on`: it is the beginning of prompts to come, so no logits are wanted and all of it may be there already.
        `fetched` was read for this prompt from where the books do not reach.
        """
        loan = self._loan(_going_on(prompt) if goes_on else prompt, session, kv, fetched)
        loan.slot.session, loan.slot.kv = session, kv
        self.counts = self.counts.with_loan(len(prompt), loan.reused)
        return loan

    def find_whole(self, tokens: TokenIds, kv: KVIdentity = BASE) -> Slot | None:
        """The slot that a prompt with `kv` which begins with all of `tokens` would start from; now used last."""
        slot, length = self.match(_going_on(tokens), kv=kv)
        if slot is None or length < len(tokens):
            return None
        self._books.touch(slot)
        self.counts = self.counts.with_loan(length, length)
        return slot

    def pin(self, slot: Slot, pin: Pin, length: int) -> None:
        """Keep the first `length` tokens of `slot` rather than others; what `pin` kept before, it keeps no longer."""
        self.unpin(pin)
        if length and not pin.released:
            slot.pins.append((pin, min(length, slot.n)))

    def unpin(self, pin: Pin) -> None:
        for slot in self.slots:
            if slot.pins:
                slot.pins = [held for held in slot.pins if held[0] is not pin and not held[0].released]

    def extend(self, slot: Slot, tokens: TokenIds) -> None:
        """`tokens` were decoded behind what the slot holds."""
        self._books.extend(slot, tokens)

    def truncate(self, slot: Slot, length: int) -> None:
        """The slot holds its first `length` tokens only."""
        self._books.truncate(slot, length)

    def give_back(self, slot: Slot) -> None:
        """The generation is over; what the slot holds stays for others."""
        slot.busy = False
        self._books.touch(slot)

    # --- for room

    def evict(self, n_cells: int) -> tuple[KVOp, ...]:
        """Free up to `n_cells`, as `cheapest_cut` says. Nothing when `evictable` is 0."""
        cut = cheapest_cut(self._books, n_cells)
        if cut is None:
            return ()
        self.counts = self.counts.with_eviction(cut.slot.n - cut.length)
        return (*self._saving(cut.slot, cut.n_own), self._books.go_back(cut.slot, cut.length))

    def forget(self, slot: Slot) -> KVOp:
        """The slot's contents are lost or wrong; it stays lent if it is."""
        self._books.truncate(slot, 0)
        return Clear(slot.seq)

    def take_away(self, slot: Slot) -> tuple[KVOp, ...]:
        """The slot is given to others, its contents saved; it stays lent if it is, and then comes back for sure."""
        return (*self._saving(slot, slot.n, certainly=slot.busy), self.forget(slot))

    def keep_saved(self, op: Save, state: SavedState) -> None:
        """`op` was carried out: `state` is what it asked for."""
        self.tier.put(Entry(op.tokens, state, op.checkpoints, self._books.now, op.kv, op.continued))
        self.slots[op.seq].saved_at = op.last_used

    def lost(self, seq: int) -> None:
        """The engine could not restore `seq`: it is empty."""
        self.checkpoints.failed()
        self._books.truncate(self.slots[seq], 0)

    # --- for models that go back to checkpoints

    def rewind(self, slot: Slot) -> KVOp:
        """What `slot` holds is spoiled, but for what its last checkpoint leads back to."""
        return self._books.go_back(slot, slot.checkpoints[-1].length if slot.checkpoints else 0)

    def wants_checkpoint(self, slot: Slot) -> bool:
        """Whether to save what `slot` holds now, so that it can be gone back to."""
        return self._books.wants_checkpoint(slot)

    def keep_checkpoint(self, slot: Slot, state: SavedState) -> None:
        """`state` was saved of what `slot` holds now. Others go if there are too many bytes."""
        self._books.keep_checkpoint(slot, state)
        self.tier.fit()

    # --- for what is taken along

    def find_longest(self, tokens: TokenIds, kv: KVIdentity) -> tuple[Slot | Entry | None, int]:
        """What leads to most of `tokens`, with `kv`: a slot or a saved sequence, and to how many; None: hardly any."""
        slot, length = self.match(_going_on(tokens), kv=kv)
        entry, saved = self.tier.find(_going_on(tokens), kv)
        if max(length, saved) < WORTH_SHARING:
            return None, 0
        return (entry, saved) if saved > length else (slot, length)

    def lend_copy(self, source: Slot | Entry, length: int) -> Loan | None:
        """An empty slot that gets the first `length` tokens of `source`; None without one, or without cells for it.

        `source` stays as it is. Nobody counts it: nothing is going to be decoded.
        """
        target = next((slot for slot in self._books.idle if not slot.n), None)
        if target is None:
            return None
        if isinstance(source, Entry):
            loan = self._recall(source, length) if source.n <= self.cells.free else None
        else:
            loan = self._copy(source, target, length) if self.reach.can_copy else None
        if loan is not None:
            loan.slot.kv = source.kv
        return loan

    def put_aside(self, source: Slot | Entry, state: Callable[[Slot], SavedState | None]) -> Aside | None:
        """An idle slot that may be used for a while and then `put_back`, saved whole by `state`: `source` if it is one.

        None where it could not come back as it was.
        """
        slot = source if isinstance(source, Slot) and not source.busy else cheapest_idle(self._books)
        if slot is None or not self.reach.restores_whole or slot.n > self.cells.free + self._books.own_cells(slot):
            return None
        saved = state(slot)
        if saved is None:
            return None
        self.checkpoints.hold(slot.checkpoints)
        checkpoints, pins = tuple(slot.checkpoints), tuple(slot.pins)
        return Aside(slot, slot.tokens.view.copy(), saved, slot.kv, checkpoints, pins, slot.continued, slot.last_used)

    def cut(self, slot: Slot, length: int) -> KVOp:
        """Let `slot` hold its first `length` tokens, as many as `find_longest` said, and no more."""
        return self._books.go_back(slot, length)

    def put_back(self, aside: Aside) -> tuple[KVOp, ...]:
        """Let the slot hold again what it did."""
        slot = aside.slot
        clear = self.forget(slot)
        slot.kv, slot.continued, slot.last_used = aside.kv, aside.continued, aside.last_used
        self._books.fill(slot, aside.tokens, aside.checkpoints)  # held since they were put aside
        slot.pins = list(aside.pins)
        return clear, Restore(slot.seq, slot.n, aside.state)

    def take_in(self, entry: Entry) -> tuple[KVOp, ...] | None:
        """Keep an `entry` that comes from outside: in the tier, or in an idle slot where the tier is too small.

        None when there is room in neither.
        """
        if self.kept_of(_going_on(entry.tokens), entry.kv) == entry.n:
            return ()
        if self.tier.takes(entry):
            entry.last_used = self._books.tick()
            self.tier.put(entry)
            return ()
        loan = self._recall(entry, entry.n) if self.has_idle and can_recall(self._books, entry) else None
        if loan is None:
            return None
        loan.slot.kv = entry.kv
        self.give_back(loan.slot)
        return loan.ops

    # --- how it is done

    def check(self) -> None:
        """Assert that the books and the tier are consistent."""
        self._books.check()
        self.tier.check()

    def _loan(self, prompt: TokenIds, session: str | None, kv: KVIdentity, fetched: Entry | None) -> Loan:
        donor, held = self.match(prompt, session, kv=kv)
        entry, saved = self.tier.find(prompt, kv)
        if fetched is not None and (further := self.tier.leads_to(fetched, prompt)) > saved:
            entry, saved = fetched, further
        match best_start(self._books, donor, held, entry, saved):
            case Recall(entry, length):
                return self._recall(entry, length)
            case TakeOver(slot, length):
                return self._take_over(slot, length)
            case Copy(donor, target, length):
                return self._copy(donor, target, length)

    def _take_over(self, slot: Slot, length: int) -> Loan:
        slot.continued = length > 0
        if length == slot.n:
            return self._lent(slot, length, ())
        ops = (*self._saving(slot, slot.n - length), self._books.go_back(slot, length))
        if isinstance(ops[-1], Restore):
            self.checkpoints.hit(length)
        return self._lent(slot, length, ops)

    def _recall(self, entry: Entry, length: int) -> Loan:
        """A slot that holds the first `length` tokens of `entry`, for which there can be cells."""
        slot = cheapest_idle(self._books)
        assert slot is not None, "an entry needs an idle slot"
        ops = list(self.take_away(slot)) if slot.n else []
        while self.cells.free < entry.n:
            ops += self.evict(entry.n - self.cells.free)
        self.checkpoints.hold(entry.checkpoints)
        self._books.fill(slot, entry.tokens, entry.checkpoints)
        slot.continued = True
        if entry in self.tier.entries:
            self.tier.used(entry, length, self._books.now)
        ops.append(Restore(slot.seq, entry.n, entry.state))
        if length < entry.n:
            ops.append(self._books.go_back(slot, length))
        self._books.thin()  # those of another process may be more than all may be
        self.tier.fit()
        return self._lent(slot, length, tuple(ops), entry)

    def _copy(self, donor: Slot, target: Slot, length: int) -> Loan:
        ops = self.take_away(target) if target.n else ()
        self._books.copy(donor, target, length)
        target.continued = False
        self._books.touch(donor)
        return self._lent(target, length, (*ops, self._copied(donor, target, length)))

    def _copied(self, donor: Slot, target: Slot, length: int) -> KVOp:
        if self.reach.can_share:
            return Share(donor.seq, target.seq, length)
        self.checkpoints.hit(length)
        return Restore(target.seq, length, self._books.checkpoint_at(donor, length).state, donor.seq)

    def _lent(self, slot: Slot, reused: int, ops: tuple[KVOp, ...], recalled: Entry | None = None) -> Loan:
        slot.busy = True
        self._books.touch(slot)
        return Loan(slot, reused, ops, recalled)

    def _saving(self, slot: Slot, n_lost: int, *, certainly: bool = False) -> tuple[KVOp, ...]:
        """Keep what `slot` holds before `n_lost` of its tokens go, where that is worth it and nobody else has them.

        `certainly`: it is sure to be asked for again.
        """
        tokens = slot.tokens.view
        continued = None if certainly else slot.continued
        if n_lost < WORTH_SAVING or not self.tier.wants(tokens, slot.kv) or self._books.is_held_twice(slot):
            return ()
        if not (self.reach.can_trim_restored or slot.busy) and slot.saved_at == slot.last_used:
            return ()  # what is left of what was saved, which does not lead to it
        if continued is not None and not self.tier.thrift.pays(continued=continued):
            return ()
        return (Save(slot.seq, tokens.copy(), tuple(slot.checkpoints), slot.kv, continued, slot.last_used),)


def _going_on(tokens: TokenIds) -> TokenIds:
    return np.concatenate([tokens, _UNKNOWN])
