"""Which sequence holds which tokens, and which of them a new prompt may start from.

A Slot is a place: one llama.cpp seq_id and the tokens whose KV it holds. It outlives requests, so prefix
reuse is the question which slot already holds most of a prompt. Three answers, in this order (and a fourth
before them, where what was saved in RAM holds clearly more: see `_ram_tier`):

1. take over: an idle slot that would be reused (nearly) whole is lent as it is, its tail trimmed;
2. share: the prefix is copied into a slot of its own; in a unified KV cache the copy is free, the cells
   are only marked as belonging to both sequences. This is how many agents share one system prompt;
3. start over: the slot whose loss costs least is cleared.

A model that cannot cut a tail off goes back to a checkpoint instead of the exact place (see `_checkpoints`);
over a copy of the cells, such a checkpoint makes a sequence of its own as well.

All of this is among sequences of one KVIdentity only: cells that were computed with other adapters are as good
as none.

Cells, not tokens, are what the cache is short of: a shared prefix occupies its cells once. `Cells` keeps
the count that llama.cpp does not report.

What makes room is what is missed least: few tokens that nobody else holds, not used for long, never continued.

Everything here is bookkeeping. What must be done to the engine is returned as KVOps, in order, and the
books already say that it was done: a decision changes the state it was decided from, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llama_worker._cells import Cells
from llama_worker._checkpoints import (
    MOST,
    WORTH_KEEPING,
    Checkpoint,
    Checkpoints,
    count_within,
    least_valuable,
    within,
)
from llama_worker._engine.base import SavedState
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._identity import BASE, KVIdentity
from llama_worker._pins import Pin
from llama_worker._ram_tier import RamTier
from llama_worker._seq_ops import Clear, KVOp, Restore, Save, Share, Trim
from llama_worker._slot import Slot
from llama_worker._tokens import TokenIds, common_prefix

NEARLY_WHOLE = 32
"""An idle slot that loses at most this many tokens is taken over rather than shared: keeping so short a
tail for others would cost a slot."""

WORTH_SHARING = 8
"""A shorter common prefix is decoded again: sharing it would keep two sequences tied for nothing."""

_UNKNOWN = np.array([-1], np.int32)
"""Stands for the next token of a prompt of which only the beginning is known."""


CONTINUED = 5
"""What a prompt continued before is so many times as likely to be continued again. In simulated mixes of conversations
and single questions over 4 to 8 slots this, times the tokens lost, over the age, left 1 to 10 % fewer tokens to decode
than giving up what was used longest ago."""


@dataclass(frozen=True, slots=True)
class Loan:
    """A slot for a prompt, how many of the prompt's tokens it holds already, and what the engine must do.

    `recalled` is the entry that it was restored from, if it was.
    """

    slot: Slot
    reused: int
    ops: tuple[KVOp, ...]
    recalled: Entry | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Aside:
    """What `slot` holds, while it is used for something else: see `PrefixCache.put_aside`."""

    slot: Slot
    tokens: TokenIds
    state: SavedState
    kv: KVIdentity
    checkpoints: tuple[Checkpoint, ...]
    pins: tuple[tuple[Pin, int], ...]
    continued: bool
    last_used: int


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
        self.slots = [Slot(seq) for seq in range(n_seq)]
        self.cells = Cells(n_cells)
        self._can_trim = can_trim
        self._can_share = can_share and can_trim
        self._needs_checkpoints = needs_checkpoints
        self._can_trim_restored = can_trim_restored
        self.checkpoints = Checkpoints(budget if needs_checkpoints else 0)
        self.tier = RamTier(budget if can_save else 0, self.checkpoints, can_trim=can_trim_restored)
        self._tick = 0
        self.counts = CacheCounts()

    def __repr__(self) -> str:
        busy = sum(slot.busy for slot in self.slots)
        return f"<PrefixCache {busy} busy, {len(self.slots) - busy} idle | {self.cells.used}/{self.cells.n} cells>"

    @property
    def has_idle(self) -> bool:
        return any(not slot.busy for slot in self.slots)

    @property
    def evictable(self) -> int:
        """Cells that evicting every idle slot would free."""
        held = self.cells.holders()
        for slot in self.slots:
            if not slot.busy and slot.n:
                held[slot.cells.view] -= 1
        return int(np.count_nonzero(held == 0)) - self.cells.free

    def match(self, prompt: TokenIds, session: str | None = None, *, kv: KVIdentity = BASE) -> tuple[Slot | None, int]:
        """The slot that holds the longest usable prefix of `prompt`, computed with `kv`, and that prefix's length.

        Of equal ones an idle one, and of these the one that `session` used last. At least one token of a prompt is
        always decoded, so the length is at most len(prompt) - 1.
        """
        best: Slot | None = None
        highest = 0, False, False
        for slot in self.slots:
            if slot.kv != kv:
                continue
            length = self._usable(slot, prompt)
            rank = length, not slot.busy, session is not None and slot.session == session
            if length and rank > highest:
                best, highest = slot, rank
        return best, highest[0]

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
        self._touch(slot)
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
        target = next((slot for slot in self.slots if not slot.busy and not slot.n), None)
        if target is None:
            return None
        if isinstance(source, Entry):
            loan = self._recall(source, length) if source.n <= self.cells.free else None
        else:
            loan = self._share(source, target, length) if self._can_share or self._needs_checkpoints else None
        if loan is not None:
            loan.slot.kv = source.kv
        return loan

    def put_aside(self, source: Slot | Entry, state: Callable[[Slot], SavedState | None]) -> Aside | None:
        """An idle slot that may be used for a while and then `put_back`, saved whole by `state`: `source` if it is one.

        None where it could not come back as it was.
        """
        slot = source if isinstance(source, Slot) and not source.busy else self._cheapest_idle()
        if slot is None or not self._can_come_back or slot.n > self.cells.free + self._own_cells(slot):
            return None
        saved = state(slot)
        if saved is None:
            return None
        self.checkpoints.hold(slot.checkpoints)
        checkpoints, pins = tuple(slot.checkpoints), tuple(slot.pins)
        return Aside(slot, slot.tokens.view.copy(), saved, slot.kv, checkpoints, pins, slot.continued, slot.last_used)

    @property
    def _can_come_back(self) -> bool:
        """Whether a sequence that was restored can all that it could before."""
        return self._can_trim_restored or not self._can_trim

    def cut(self, slot: Slot, length: int) -> KVOp:
        """Let `slot` hold its first `length` tokens, as many as `find_longest` said, and no more."""
        return self._go_back(slot, length)

    def put_back(self, aside: Aside) -> tuple[KVOp, ...]:
        """Let the slot hold again what it did."""
        slot = aside.slot
        clear = self.forget(slot)
        slot.kv, slot.continued, slot.last_used = aside.kv, aside.continued, aside.last_used
        self.extend(slot, aside.tokens)
        slot.checkpoints.extend(aside.checkpoints)  # held since they were put aside
        slot.firm = 0 if self._can_trim_restored else slot.n
        slot.pins = list(aside.pins)
        return clear, Restore(slot.seq, slot.n, aside.state)

    def take_in(self, entry: Entry) -> tuple[KVOp, ...] | None:
        """Keep an `entry` that comes from outside: in the tier, or in an idle slot where the tier is too small.

        None when there is room in neither.
        """
        if self.kept_of(_going_on(entry.tokens), entry.kv) == entry.n:
            return ()
        if self.tier.takes(entry):
            self._tick += 1
            entry.last_used = self._tick
            self.tier.put(entry)
            return ()
        loan = self._recall(entry, entry.n) if self.has_idle else None
        if loan is None:
            return None
        loan.slot.kv = entry.kv
        self.give_back(loan.slot)
        return loan.ops

    def extend(self, slot: Slot, tokens: TokenIds) -> None:
        """`tokens` were decoded behind what the slot holds."""
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

    def give_back(self, slot: Slot) -> None:
        """The generation is over; what the slot holds stays for others."""
        slot.busy = False
        self._touch(slot)

    def evict(self, n_cells: int) -> tuple[KVOp, ...]:
        """Free up to `n_cells` from the tail of the idle slot whose tail is missed least.

        Heads are what others may start from, so they go last; then, whole, those that only idle slots share,
        which frees nothing until their last holder goes: ask again; and last of all what is pinned. Nothing when
        `evictable` is 0.
        """
        idle = [slot for slot in self.slots if not slot.busy and slot.n and not self._is_held_by_busy(slot)]
        if not idle:
            return ()
        own = {slot.seq: self._own_cells(slot) for slot in idle}
        loose = {slot.seq: min(own[slot.seq], slot.n - slot.pinned) for slot in idle}
        goes = {seq: loose[seq] or own[seq] for seq in own}
        spared = {slot.seq: self._spared(slot, min(n_cells, goes[slot.seq])) for slot in idle}

        def loss(slot: Slot) -> tuple[bool, bool, float]:
            """What is lost for each cell that was asked for: going back to a checkpoint loses more than that."""
            n_lost = min(slot.n - spared[slot.seq], own[slot.seq])
            for_each = n_lost / min(n_cells, max(n_lost, 1)) * self._likelihood(slot)
            return _pinned_whole(slot, loose), own[slot.seq] == 0, for_each

        victim = min(idle, key=lambda slot: (*loss(slot), slot.last_used))
        length = spared[victim.seq]
        self.counts = self.counts.with_eviction(victim.n - length)
        return (*self._saving(victim, own[victim.seq]), self._go_back(victim, length))

    def forget(self, slot: Slot) -> KVOp:
        """The slot's contents are lost or wrong; it stays lent if it is."""
        self.truncate(slot, 0)
        return Clear(slot.seq)

    def take_away(self, slot: Slot) -> tuple[KVOp, ...]:
        """The slot is given to others, its contents saved; it stays lent if it is, and then comes back for sure."""
        return (*self._saving(slot, slot.n, certainly=slot.busy), self.forget(slot))

    def keep_saved(self, op: Save, state: SavedState) -> None:
        """`op` was carried out: `state` is what it asked for."""
        self.tier.put(Entry(op.tokens, state, op.checkpoints, self._tick, op.kv, op.continued))

    def rewind(self, slot: Slot) -> KVOp:
        """What `slot` holds is spoiled, but for what its last checkpoint leads back to."""
        return self._go_back(slot, slot.checkpoints[-1].length if slot.checkpoints else 0)

    def wants_checkpoint(self, slot: Slot) -> bool:
        """Whether to save what `slot` holds now, so that it can be gone back to."""
        last = slot.checkpoints[-1].length if slot.checkpoints else 0
        return self.checkpoints.has_room and slot.n - last >= WORTH_KEEPING

    def keep_checkpoint(self, slot: Slot, state: SavedState) -> None:
        """`state` was saved of what `slot` holds now. Others go if there are too many bytes."""
        checkpoint = Checkpoint(slot.n, state, self._tick)
        if not self.checkpoints.taken(checkpoint):
            return
        slot.checkpoints.append(checkpoint)
        self.checkpoints.hold([checkpoint])
        if len(slot.checkpoints) > MOST:
            self._drop(least_valuable([slot.checkpoints], self._tick, checkpoint))
        self._thin(checkpoint)

    def _thin(self, newest: Checkpoint | None) -> None:
        while self.checkpoints.over_budget:
            self._drop(least_valuable([slot.checkpoints for slot in self.slots], self._tick, newest))
        self.tier.fit()

    def lost(self, seq: int) -> None:
        """The engine could not restore `seq`: it is empty."""
        self.checkpoints.failed()
        self.truncate(self.slots[seq], 0)

    def check(self) -> None:
        """Assert that the books are consistent: every held cell is counted once per holder."""
        self._check_checkpoints()
        self.tier.check()
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

    def kept_of(self, prompt: TokenIds, kv: KVIdentity) -> int:
        """How many of the first tokens of `prompt`, with `kv`, a slot or the tier leads to; at most all but one."""
        return max(self.match(prompt, kv=kv)[1], self.tier.find(prompt, kv)[1])

    def _is_held_by_busy(self, slot: Slot) -> bool:
        """Whether a busy slot holds all that `slot` does. Sharing is by prefix: then it holds the last cell."""
        n = slot.n
        last = slot.cells.view[n - 1]
        return any(other.busy and other.n >= n and other.cells.view[n - 1] == last for other in self.slots)

    def _own_cells(self, slot: Slot) -> int:
        """Cells that nobody else holds: the slot's tail."""
        return slot.n - self.cells.n_shared(slot.cells.view)

    def _spared(self, slot: Slot, n_cells: int) -> int:
        """How many tokens `slot` keeps when it gives up its last `n_cells`, which nobody else holds."""
        return self._reachable(slot, slot.n - n_cells) if n_cells else 0

    def _likelihood(self, slot: Slot) -> float:
        """How likely what an idle `slot` holds is asked for again; of use to compare."""
        return (CONTINUED if slot.continued else 1) / (1 + self._tick - slot.last_used)

    def _usable(self, slot: Slot, prompt: TokenIds) -> int:
        if not slot.n:
            return 0
        length = min(common_prefix(slot.tokens.view, prompt), len(prompt) - 1)
        if length == slot.n and not slot.busy:
            return length
        return self._reachable(slot, length)

    def _reachable(self, slot: Slot, length: int) -> int:
        """How many of the first `length` tokens of `slot` can be gone back to, or shared."""
        if self._can_trim:
            return length if length >= slot.firm else 0
        checkpoint = within(slot.checkpoints, length)
        return checkpoint.length if checkpoint is not None else 0

    def _go_back(self, slot: Slot, length: int) -> KVOp:
        """Let `slot` hold its first `length` tokens, as many as `_reachable` said, which is less than it does."""
        op: KVOp
        if not length:
            op = Clear(slot.seq)
        elif self._can_trim:
            op = Trim(slot.seq, length)
        else:
            op = Restore(slot.seq, length, self._checkpoint(slot, length).state)
        self.truncate(slot, length)
        return op

    def _checkpoint(self, slot: Slot, length: int) -> Checkpoint:
        checkpoint = within(slot.checkpoints, length)
        assert checkpoint is not None, f"{slot} has no checkpoint at {length}"
        assert checkpoint.length == length, f"{slot} has no checkpoint at {length}"
        checkpoint.last_used = self._tick
        return checkpoint

    def _drop(self, checkpoint: Checkpoint) -> None:
        for slot in self.slots:
            if checkpoint in slot.checkpoints:
                slot.checkpoints.remove(checkpoint)
                self.checkpoints.let_go([checkpoint])
        self.checkpoints.dropped()

    def _loan(self, prompt: TokenIds, session: str | None, kv: KVIdentity, fetched: Entry | None = None) -> Loan:
        donor, length = self.match(prompt, session, kv=kv)
        entry, saved = self.tier.find(prompt, kv)
        if fetched is not None and (further := self.tier.leads_to(fetched, prompt)) > saved:
            entry, saved = fetched, further
        if entry is not None and saved - length >= WORTH_SAVING:
            loan = self._recall(entry, saved)
            if loan is not None:
                return loan
        if donor is not None and not donor.busy and donor.n - length <= NEARLY_WHOLE and length >= donor.pinned:
            return self._take_over(donor, length)
        if donor is not None and (self._can_share or self._needs_checkpoints) and length >= WORTH_SHARING:
            target = self._cheapest_idle(other_than=donor)
            if target is not None:
                return self._share(donor, target, length)
        if donor is not None and not donor.busy and length >= WORTH_SHARING:
            return self._take_over(donor, length)
        slot = self._cheapest_idle()
        assert slot is not None, "lend() needs an idle slot"
        return self._take_over(slot, 0)

    def _take_over(self, slot: Slot, length: int) -> Loan:
        slot.continued = length > 0
        if length == slot.n:
            return self._lent(slot, length, ())
        ops = (*self._saving(slot, slot.n - length), self._go_back(slot, length))
        if isinstance(ops[-1], Restore):
            self.checkpoints.hit(length)
        return self._lent(slot, length, ops)

    def _recall(self, entry: Entry, length: int) -> Loan | None:
        """A slot that holds the first `length` tokens of `entry`; None where there are not cells for it whole."""
        if entry.n > self.cells.free + self.evictable:
            return None
        slot = self._cheapest_idle()
        assert slot is not None, "lend() needs an idle slot"
        ops = list(self.take_away(slot)) if slot.n else []
        while self.cells.free < entry.n:
            ops += self.evict(entry.n - self.cells.free)
        self.extend(slot, entry.tokens)
        slot.continued = True
        slot.checkpoints.extend(entry.checkpoints)
        self.checkpoints.hold(slot.checkpoints)
        slot.firm = 0 if self._can_trim_restored else entry.n
        if entry in self.tier.entries:
            self.tier.used(entry, length, self._tick)
        ops.append(Restore(slot.seq, entry.n, entry.state))
        if length < entry.n:
            ops.append(self._go_back(slot, length))
        self._thin(None)  # those of another process may be more than all may be
        return self._lent(slot, length, tuple(ops), entry)

    def _saving(self, slot: Slot, n_lost: int, *, certainly: bool = False) -> tuple[KVOp, ...]:
        """Keep what `slot` holds before `n_lost` of its tokens go, where that is worth it and nobody else has them.

        `certainly`: it is sure to be asked for again.
        """
        tokens = slot.tokens.view
        continued = None if certainly else slot.continued
        if n_lost < WORTH_SAVING or not self.tier.wants(tokens, slot.kv):
            return ()
        others = [other for other in self.slots if other is not slot and other.kv == slot.kv]
        if any(common_prefix(other.tokens.view, tokens) == slot.n for other in others):
            return ()
        if continued is not None and not self.tier.thrift.pays(continued=continued):
            return ()
        return (Save(slot.seq, tokens.copy(), tuple(slot.checkpoints), slot.kv, continued),)

    def _share(self, donor: Slot, target: Slot, length: int) -> Loan:
        ops = self.take_away(target) if target.n else ()
        target.tokens.extend(donor.tokens.part(0, length))
        target.cells.extend(donor.cells.part(0, length))
        self.cells.hold(target.cells.view)
        target.continued = False
        target.firm = min(donor.firm, length)
        target.checkpoints.extend(donor.checkpoints[: count_within(donor.checkpoints, length)])
        self.checkpoints.hold(target.checkpoints)
        self._touch(donor)
        return self._lent(target, length, (*ops, self._copied(donor, target, length)))

    def _copied(self, donor: Slot, target: Slot, length: int) -> KVOp:
        if self._can_share:
            return Share(donor.seq, target.seq, length)
        self.checkpoints.hit(length)
        return Restore(target.seq, length, self._checkpoint(donor, length).state, donor.seq)

    def _lent(self, slot: Slot, reused: int, ops: tuple[KVOp, ...], recalled: Entry | None = None) -> Loan:
        slot.busy = True
        self._touch(slot)
        return Loan(slot, reused, ops, recalled)

    def _cheapest_idle(self, other_than: Slot | None = None) -> Slot | None:
        """The idle slot whose loss costs least: the tokens that nobody else holds, times how likely they are missed."""
        idle = [slot for slot in self.slots if not slot.busy and slot is not other_than]
        if len(idle) < 2:
            return idle[0] if idle else None
        return min(idle, key=lambda slot: (slot.pinned > 0, self._loss(slot), slot.n > 0, slot.last_used))

    def _loss(self, slot: Slot) -> float:
        return self._own_cells(slot) * self._likelihood(slot) if slot.n else 0.0

    def _touch(self, slot: Slot) -> None:
        self._tick += 1
        slot.last_used = self._tick


def _going_on(tokens: TokenIds) -> TokenIds:
    return np.concatenate([tokens, _UNKNOWN])


def _pinned_whole(slot: Slot, loose: Mapping[int, int]) -> bool:
    """Whether evicting anything of `slot` would take what is pinned."""
    return bool(slot.pinned) and not loose[slot.seq]
