"""What is missed least: the slot that makes room for a prompt, and the tail that makes room for tokens.

That is what has few tokens that nobody else holds, was not used for long and never continued. What a session pinned
goes last of all. Nothing is done here: these functions read the books and say what to give up.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_worker._books import Books
from llama_worker._slot import Slot

CONTINUED = 5
"""What a prompt continued before is so many times as likely to be continued again. In simulated mixes of conversations
and single questions over 4 to 8 slots this, times the tokens lost, over the age, left 1 to 10 % fewer tokens to decode
than giving up what was used longest ago."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Going back to the first `length` tokens of an idle `slot`, of which nobody else holds `n_own`.

    `takes_pinned`: nothing of it is loose, so this takes what a session wants to be kept.
    """

    slot: Slot
    length: int
    n_own: int
    takes_pinned: bool


def cheapest_idle(books: Books, other_than: Slot | None = None) -> Slot | None:
    """The idle slot whose loss costs least: the tokens that nobody else holds, times how likely they are missed."""
    idle = [slot for slot in books.idle if slot is not other_than]
    if len(idle) < 2:
        return idle[0] if idle else None
    return min(idle, key=lambda slot: (slot.pinned > 0, _loss(books, slot), slot.n > 0, slot.last_used))


def cheapest_cut(books: Books, n_cells: int) -> Cut | None:
    """What frees up to `n_cells` from the tail of the idle slot whose tail is missed least; None if nothing does.

    Heads are what others may start from, so they go last; then, whole, those that only idle slots share,
    which frees nothing until their last holder goes: ask again; and last of all what is pinned.
    """
    idle = [slot for slot in books.idle if slot.n and not books.is_held_by_busy(slot)]
    cuts = [_cut(books, slot, n_cells) for slot in idle]
    return min(
        cuts,
        key=lambda cut: (cut.takes_pinned, cut.n_own == 0, _loss_per_cell(books, cut, n_cells), cut.slot.last_used),
        default=None,
    )


def _cut(books: Books, slot: Slot, n_cells: int) -> Cut:
    own = books.own_cells(slot)
    loose = min(own, slot.n - slot.pinned)
    goes = min(n_cells, loose or own)
    length = books.reach.reachable(slot, slot.n - goes) if goes else 0
    return Cut(slot, length, own, takes_pinned=slot.pinned > 0 and not loose)


def _loss_per_cell(books: Books, cut: Cut, n_cells: int) -> float:
    """What is lost for each cell that was asked for: going back to a checkpoint loses more than that."""
    n_lost = min(cut.slot.n - cut.length, cut.n_own)
    return n_lost / min(n_cells, max(n_lost, 1)) * _likelihood(books, cut.slot)


def _loss(books: Books, slot: Slot) -> float:
    return books.own_cells(slot) * _likelihood(books, slot) if slot.n else 0.0


def _likelihood(books: Books, slot: Slot) -> float:
    """How likely what an idle `slot` holds is asked for again; of use to compare."""
    return (CONTINUED if slot.continued else 1) / (1 + books.now - slot.last_used)
