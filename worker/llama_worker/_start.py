"""Start: what a prompt starts from. Three answers, in this order, and a fourth before them:

0. recall: what was saved holds clearly more (see `_ram_tier`), so it is restored into a slot;
1. take over: an idle slot that would be reused (nearly) whole is lent as it is, its tail trimmed;
2. copy: the prefix is copied into a slot of its own; in a unified KV cache the copy is free, the cells are only
   marked as belonging to both sequences. This is how many agents share one system prompt;
3. start over: the slot whose loss costs least is taken over with none of its tokens.

A model that cannot cut a tail off goes back to a checkpoint instead of the exact place (see `_checkpoints`);
over a copy of the cells, such a checkpoint makes a sequence of its own as well.

All of this is among sequences of one KVIdentity only: cells that were computed with other adapters are as good
as none. Nothing is done here: these functions read the books and say what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from llama_worker._books import Books
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._eviction import cheapest_idle
from llama_worker._identity import KVIdentity
from llama_worker._slot import Slot
from llama_worker._tokens import TokenIds

NEARLY_WHOLE = 32
"""An idle slot that loses at most this many tokens is taken over rather than shared: keeping so short a
tail for others would cost a slot."""

WORTH_SHARING = 8
"""A shorter common prefix is decoded again: sharing it would keep two sequences tied for nothing."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Restore `entry` into the idle slot whose loss costs least, and keep its first `length` tokens."""

    entry: Entry
    length: int


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Lend `slot` with its first `length` tokens."""

    slot: Slot
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Let the idle `target`, whatever it holds, hold the first `length` tokens of `donor`."""

    donor: Slot
    target: Slot
    length: int


Start: TypeAlias = Recall | TakeOver | Copy


def longest_held(books: Books, prompt: TokenIds, session: str | None, kv: KVIdentity) -> tuple[Slot | None, int]:
    """The slot that the longest usable prefix of `prompt` can be had from, and its length; see `PrefixCache.match`."""
    best: Slot | None = None
    highest = 0, False, False
    for slot in books.slots:
        if slot.kv != kv:
            continue
        length = books.reach.usable(slot, prompt)
        rank = length, not slot.busy, session is not None and slot.session == session
        if length and rank > highest:
            best, highest = slot, rank
    return best, highest[0]


def best_start(books: Books, donor: Slot | None, held: int, entry: Entry | None, saved: int) -> Start:
    """Where a prompt starts of which `donor` holds the first `held` tokens and `entry` the first `saved`.

    There is an idle slot.
    """
    if entry is not None and saved - held >= WORTH_SAVING and can_recall(books, entry):
        return Recall(entry, saved)
    if donor is not None and not donor.busy and donor.n - held <= NEARLY_WHOLE and held >= donor.pinned:
        return TakeOver(donor, held)
    if donor is not None and held >= WORTH_SHARING:
        target = cheapest_idle(books, other_than=donor) if books.reach.can_copy else None
        if target is not None:
            return Copy(donor, target, held)
        if not donor.busy:
            return TakeOver(donor, held)
    slot = cheapest_idle(books)
    assert slot is not None, "a prompt needs an idle slot to start in"
    return TakeOver(slot, 0)


def can_recall(books: Books, entry: Entry) -> bool:
    """Whether there can be cells for `entry`, which has to be restored whole."""
    return entry.n <= books.cells.free + books.evictable
