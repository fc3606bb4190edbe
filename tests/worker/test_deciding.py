"""What a prompt starts from and who makes room for it are said, not done: whoever asks finds the books as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._books import Books
from llama_worker._checkpoints import Checkpoints
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._eviction import cheapest_cut, cheapest_idle
from llama_worker._identity import BASE
from llama_worker._pins import Pin
from llama_worker._reach import Reach
from llama_worker._start import Copy, Recall, TakeOver, best_start, longest_held
from tests.worker.test_prefix_cache import ids, run_of, state

KINDS = ["trims", "checkpoints"]


def books_of(kind: str, n_seq: int = 3, n_cells: int = 2048) -> Books:
    trims = kind == "trims"
    reach = Reach(can_trim=trims, can_share=trims, needs_checkpoints=not trims, can_trim_restored=trims)
    return Books(n_seq=n_seq, n_cells=n_cells, reach=reach, checkpoints=Checkpoints(10_000))


def write(books: Books, seq: int, start: int, n: int, *, busy: bool = False) -> None:
    """Slot `seq` holds `n` tokens, half of them before a checkpoint where one is wanted."""
    slot = books.slots[seq]
    for part in (n // 2, n - n // 2):
        books.extend(slot, run_of(start + slot.n, part))
        if books.reach.needs_checkpoints and books.wants_checkpoint(slot):
            books.keep_checkpoint(slot, state())
    slot.busy = busy
    books.touch(slot)


def written(books: Books) -> object:
    """All that stands in them."""
    slots = [
        (slot.tokens.view.tolist(), slot.cells.view.tolist(), slot.firm, slot.busy, slot.last_used, slot.continued)
        for slot in books.slots
    ]
    checkpoints = [(c.length, c.holders, c.last_used) for slot in books.slots for c in slot.checkpoints]
    cells = books.cells.free, books.cells.holders().tolist()
    return slots, checkpoints, cells, books.now, books.checkpoints.counts, [list(slot.pins) for slot in books.slots]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(40, 400), st.booleans()), min_size=3, max_size=3),
    st.integers(1, 500),
    st.integers(1, 600),
)
def test_deciding_changes_nothing(kind: str, held: list[tuple[int, int, bool]], n: int, n_cells: int):
    books = books_of(kind)
    for seq, (family, length, busy) in enumerate(held):
        write(books, seq, family * 1000, length, busy=busy and seq > 0)
    books.slots[0].pins.append((Pin(), 20))
    before = written(books)
    prompt = np.concatenate([run_of(0, n), ids(7, 8)])
    donor, length = longest_held(books, prompt, None, BASE)
    entry = Entry(run_of(0, n), state(), (), 0)
    for saved in (0, n):
        best_start(books, donor, length, entry, saved)
    cheapest_cut(books, n_cells)
    cheapest_idle(books, other_than=donor)
    assert written(books) == before
    books.check()


def test_what_is_saved_is_recalled_where_it_leads_clearly_further_and_there_can_be_cells_for_it():
    books = books_of("trims", n_cells=1000)
    write(books, 0, 0, 200)
    donor, entry = books.slots[0], Entry(run_of(0, 800), state(), (), 0)
    assert best_start(books, donor, 200, entry, 200 + WORTH_SAVING) == Recall(entry, 200 + WORTH_SAVING)
    assert best_start(books, donor, 200, entry, 199 + WORTH_SAVING) == TakeOver(donor, 200)
    write(books, 1, 5000, 201, busy=True)
    assert best_start(books, donor, 200, entry, 800) == TakeOver(donor, 200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_donor_is_copied_and_none_that_holds_hardly_anything(kind: str):
    books = books_of(kind)
    write(books, 0, 0, 200, busy=True)
    donor = books.slots[0]
    assert best_start(books, donor, 100, None, 0) == Copy(donor, books.slots[1], 100)
    assert best_start(books, donor, 7, None, 0) == TakeOver(books.slots[1], 0)


def test_what_is_pinned_is_cut_last_and_only_when_nothing_else_is_left():
    books = books_of("trims", n_seq=2)
    write(books, 0, 0, 100)
    write(books, 1, 1000, 300)
    books.slots[0].pins.append((Pin(), 100))
    cut = cheapest_cut(books, 50)
    assert cut is not None
    assert (cut.slot, cut.length, cut.n_own, cut.takes_pinned) == (books.slots[1], 250, 300, False)
    books.slots[1].busy = True
    cut = cheapest_cut(books, 50)
    assert cut is not None
    assert (cut.slot, cut.length, cut.takes_pinned) == (books.slots[0], 50, True)
    books.slots[0].busy = True
    assert cheapest_cut(books, 50) is None
