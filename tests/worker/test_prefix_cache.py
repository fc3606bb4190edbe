"""Which tokens a new prompt may start from, and that the books never lie about them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._prefix_cache import Clear, Loan, PrefixCache, Share, Trim


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def run_of(start: int, n: int) -> np.ndarray:
    return np.arange(start, start + n, dtype=np.int32)


def cache(n_seq: int = 4, n_cells: int = 1024, *, can_trim: bool = True, can_share: bool = True) -> PrefixCache:
    return PrefixCache(n_seq=n_seq, n_cells=n_cells, can_trim=can_trim, can_share=can_share)


def fill(books: PrefixCache, tokens: np.ndarray, *, give_back: bool = True) -> Loan:
    """Serve a prompt as the scheduler does."""
    loan = books.lend(tokens)
    books.extend(loan.slot, tokens[loan.reused :])
    if give_back:
        books.give_back(loan.slot)
    books.check()
    return loan


def test_the_continuation_of_a_conversation_takes_its_slot_over():
    books = cache()
    first = fill(books, run_of(0, 100))
    second = fill(books, run_of(0, 150))
    assert (second.slot, second.reused, second.ops) == (first.slot, 100, ())


def test_the_last_token_is_always_decoded_again():
    """Its logits are needed, and no cache keeps them."""
    books = cache()
    fill(books, run_of(0, 100))
    again = books.lend(run_of(0, 100))
    assert again.reused == 99
    assert again.ops == (Trim(again.slot.seq, 99),)


def test_a_busy_donor_shares_its_prefix_at_no_cost_in_cells():
    books = cache()
    system = run_of(0, 200)
    donor = fill(books, np.concatenate([system, ids(900, 901)]), give_back=False)
    free = books.cells.free
    loan = books.lend(np.concatenate([system, ids(800)]))
    assert loan.slot is not donor.slot
    assert loan.reused == 200
    assert loan.ops == (Share(donor.slot.seq, loan.slot.seq, 200),)
    assert books.cells.free == free
    books.check()


def test_an_idle_conversation_is_not_destroyed_for_a_newcomer_with_the_same_system_prompt():
    books = cache()
    system = run_of(0, 200)
    old = fill(books, np.concatenate([system, run_of(500, 100)]))
    fill(books, np.concatenate([system, run_of(700, 100)]))
    assert old.slot.n == 300
    assert fill(books, np.concatenate([system, run_of(500, 120)])).reused == 300


def test_eviction_cuts_the_tail_of_the_slot_used_longest_ago_and_keeps_shared_heads():
    """The donor of a shared prefix counts as used when it is shared."""
    books = cache(n_cells=400)
    system = run_of(0, 100)
    first = fill(books, np.concatenate([system, run_of(500, 100)]))
    second = fill(books, np.concatenate([system, run_of(700, 100)]))
    assert books.cells.free == 100
    assert books.evict(60) == Trim(first.slot.seq, 140)
    assert books.cells.free == 160
    assert books.evict(10_000) == Trim(first.slot.seq, 100)
    assert books.evict(10_000) == Trim(second.slot.seq, 100)
    books.check()


def test_what_only_idle_slots_share_can_be_evicted_too():
    """Evicting until there is nothing left frees all that `evictable` promised."""
    books = cache(n_cells=400)
    system = run_of(0, 300)
    for agent in (ids(900), ids(800)):
        fill(books, np.concatenate([system, agent, agent]))
    busy = fill(books, run_of(600, 20), give_back=False)
    promised = books.cells.free + books.evictable
    while books.evict(50) is not None:
        books.check()
    assert books.cells.free == promised == 400 - busy.slot.n
    assert books.evictable == 0


def test_nothing_to_evict_is_said_so():
    books = cache()
    fill(books, run_of(0, 50), give_back=False)
    assert books.evict(10) is None


def test_a_model_that_cannot_trim_reuses_a_slot_whole_or_not_at_all():
    books = cache(can_trim=False, can_share=False)
    first = fill(books, run_of(0, 100))
    assert fill(books, run_of(0, 120)).reused == 100
    other = books.lend(np.concatenate([run_of(0, 60), ids(7)]))
    assert other.reused == 0
    assert other.slot is not first.slot or other.ops == (Clear(other.slot.seq),)


def test_check_notices_a_cell_that_is_counted_twice():
    """The check itself can fail."""
    books = cache()
    loan = fill(books, run_of(0, 10))
    loan.slot.cells[3] = loan.slot.cells[4]
    with pytest.raises(AssertionError):
        books.check()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 40), st.booleans()), min_size=1, max_size=30
    )
)
def test_books_hold_under_any_sequence_of_prompts(steps: list[tuple[int, int, int, bool]]):
    """Prompts over few prefixes, some kept busy for a while: reuse is always a true prefix, cells add up."""
    books = cache(n_seq=3, n_cells=512)
    busy = []
    for family, shared, own, keep in steps:
        while not books.has_idle:
            books.give_back(busy.pop(0))
        prompt = np.concatenate([run_of(family * 1000, shared), run_of(5000 + shared, own + 1)])
        loan = books.lend(prompt)
        assert np.array_equal(loan.slot.tokens.view, prompt[: loan.reused])
        assert loan.reused < len(prompt)
        while books.cells.free < len(prompt) - loan.reused:
            if books.evict(len(prompt)) is None:
                books.give_back(busy.pop(0))
        books.extend(loan.slot, prompt[loan.reused :])
        books.check()
        busy.append(loan.slot)
        if not keep:
            books.give_back(busy.pop())
