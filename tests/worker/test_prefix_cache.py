"""Which tokens a new prompt may start from, and that the books never lie about them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._checkpoints import MOST
from llama_worker._loan import Loan
from llama_worker._prefix_cache import PrefixCache
from llama_worker._seq_ops import Clear, Restore, Share, Trim


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def run_of(start: int, n: int) -> np.ndarray:
    return np.arange(start, start + n, dtype=np.int32)


def cache(n_seq: int = 4, n_cells: int = 1024, *, can_trim: bool = True, can_share: bool = True) -> PrefixCache:
    return PrefixCache(n_seq=n_seq, n_cells=n_cells, can_trim=can_trim, can_share=can_share)


def forgetful(n_seq: int = 4, n_cells: int = 4096, *, budget: int = 10_000) -> PrefixCache:
    """The books of a model that goes back to checkpoints."""
    return PrefixCache(
        n_seq=n_seq, n_cells=n_cells, can_trim=False, can_share=False, needs_checkpoints=True, budget=budget
    )


def state(n_bytes: int = 100) -> np.ndarray:
    return np.zeros(n_bytes, np.uint8)


def serve(books: PrefixCache, tokens: np.ndarray, *boundaries: int, give_back: bool = True, size: int = 100) -> Loan:
    """As `fill`, with a checkpoint at each of `boundaries` that the prompt comes to."""
    loan = books.lend(tokens)
    for end in [*[b for b in boundaries if b > loan.slot.n], len(tokens)]:
        books.extend(loan.slot, tokens[loan.slot.n : end])
        if end in boundaries and books.wants_checkpoint(loan.slot):
            books.keep_checkpoint(loan.slot, state(size))
        books.check()
    if give_back:
        books.give_back(loan.slot)
    return loan


def places(loan: Loan) -> list[int]:
    return [checkpoint.length for checkpoint in loan.slot.checkpoints]


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
    assert books.evict(60) == (Trim(first.slot.seq, 140),)
    assert books.cells.free == 160
    assert books.evict(10_000) == (Trim(first.slot.seq, 100),)
    assert books.evict(10_000) == (Trim(second.slot.seq, 100),)
    books.check()


def test_what_only_idle_slots_share_can_be_evicted_too():
    """Evicting until there is nothing left frees all that `evictable` promised."""
    books = cache(n_cells=400)
    system = run_of(0, 300)
    for agent in (ids(900), ids(800)):
        fill(books, np.concatenate([system, agent, agent]))
    busy = fill(books, run_of(600, 20), give_back=False)
    promised = books.cells.free + books.evictable
    while books.evict(50):
        books.check()
    assert books.cells.free == promised == 400 - busy.slot.n
    assert books.evictable == 0


def test_nothing_to_evict_is_said_so():
    books = cache()
    fill(books, run_of(0, 50), give_back=False)
    assert books.evict(10) == ()


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
    loan.slot.cells.view[3] = loan.slot.cells.view[4]
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
            if not books.evict(len(prompt)):
                books.give_back(busy.pop(0))
        books.extend(loan.slot, prompt[loan.reused :])
        books.check()
        busy.append(loan.slot)
        if not keep:
            books.give_back(busy.pop())


# --- checkpoints


def test_a_prompt_that_departs_from_the_last_goes_back_to_the_checkpoint_before():
    books = forgetful(n_seq=1)
    serve(books, run_of(0, 300), 100, 200)
    loan = books.lend(np.concatenate([run_of(0, 250), ids(7)]))
    assert loan.reused == 200
    (op,) = loan.ops
    assert isinstance(op, Restore)
    assert (op.seq, op.length, op.donor) == (loan.slot.seq, 200, None)
    assert places(loan) == [100, 200]
    books.check()


def test_an_extension_needs_no_checkpoint():
    books = forgetful()
    serve(books, run_of(0, 300), 100, 200)
    assert (books.lend(run_of(0, 350)).reused, books.checkpoints.counts.hits) == (300, 0)


@pytest.mark.parametrize(("common", "reused"), [(199, 100), (200, 200), (201, 200), (99, 0), (100, 100)])
def test_a_checkpoint_is_used_up_to_the_last_common_token(common: int, reused: int):
    books = forgetful()
    serve(books, run_of(0, 300), 100, 200)
    assert books.lend(np.concatenate([run_of(0, common), ids(7, 8)])).reused == reused


def test_a_busy_conversation_is_branched_off_at_its_checkpoint():
    """The branch holds the donor's checkpoints as well, and both hold the same cells."""
    books = forgetful()
    donor = serve(books, run_of(0, 300), 100, 200, give_back=False)
    free = books.cells.free
    loan = books.lend(np.concatenate([run_of(0, 210), ids(7)]))
    (op,) = loan.ops
    assert isinstance(op, Restore)
    assert (op.seq, op.length, op.donor) == (loan.slot.seq, 200, donor.slot.seq)
    assert (books.cells.free, places(loan), places(donor)) == (free, [100, 200], [100, 200])
    assert books.checkpoints.n == 2
    books.check()


def test_checkpoints_go_with_the_cells_they_need():
    books = forgetful(n_seq=1)
    loan = serve(books, run_of(0, 300), 100, 200)
    books.truncate(loan.slot, 199)
    assert (places(loan), books.checkpoints.n, books.checkpoints.n_bytes) == ([100], 1, 100)
    books.check()
    serve(books, run_of(5000, 50))
    assert (books.checkpoints.n, books.checkpoints.n_bytes) == (0, 0)


def test_evicting_a_tail_spares_what_a_checkpoint_leads_back_to():
    books = forgetful()
    loan = serve(books, run_of(0, 300), 100, 200)
    (op,) = books.evict(20)
    assert isinstance(op, Restore)
    assert (op.length, loan.slot.n) == (200, 200)
    assert books.evict(20)
    assert loan.slot.n == 100
    assert books.evict(20) == (Clear(loan.slot.seq),)
    books.check()


def test_a_state_that_could_not_be_restored_is_forgotten():
    books = forgetful()
    serve(books, run_of(0, 300), 200)
    loan = books.lend(np.concatenate([run_of(0, 250), ids(7)]))
    books.lost(loan.slot.seq)
    assert (loan.slot.n, books.checkpoints.counts.failed) == (0, 1)
    books.check()


def test_a_place_close_behind_another_is_not_kept():
    books = forgetful()
    assert places(serve(books, run_of(0, 300), 10, 100, 110, 200)) == [100, 200]


def test_a_budget_bounds_the_bytes_and_spares_what_is_used():
    """Room for five: the system prompt that all share and each session's newest place outlast older ones."""
    books = forgetful(budget=500)
    system = run_of(0, 200)
    sessions = [np.concatenate([system, run_of(1000 * i, 60)]) for i in range(1, 5)]
    for turn in range(6):
        for i, history in enumerate(sessions):
            grown = np.concatenate([history, run_of(1000 * (i + 1) + 100 * (turn + 1), 80)])
            serve(books, grown, 200, len(history), len(grown) - 2)
            assert books.checkpoints.n_bytes <= 500
            sessions[i] = grown[:-2]
    kept = {checkpoint.length for slot in books.slots for checkpoint in slot.checkpoints}
    assert 200 in kept, "what all share"
    newest = [slot.checkpoints[-1].length for slot in books.slots if slot.checkpoints]
    assert max(newest) == max(len(history) for history in sessions)


def test_a_state_larger_than_the_budget_is_not_asked_for_twice():
    books = forgetful(budget=50)
    loan = serve(books, run_of(0, 300), 100)
    assert not books.wants_checkpoint(loan.slot)
    assert (books.checkpoints.n, books.checkpoints.n_bytes) == (0, 0)


def test_one_sequence_has_so_many_checkpoints_and_no_more():
    books = forgetful(budget=10**9)
    loan = serve(books, run_of(0, 4000), *range(80, 4000, 80))
    assert len(places(loan)) == MOST
    assert places(loan)[-1] == 3920


def test_check_notices_a_checkpoint_beyond_what_is_held():
    books = forgetful()
    loan = serve(books, run_of(0, 300), 200)
    loan.slot.checkpoints[0].length = 301
    with pytest.raises(AssertionError):
        books.check()


def test_check_notices_a_checkpoint_that_nobody_counts():
    books = forgetful()
    loan = serve(books, run_of(0, 300), 200)
    loan.slot.checkpoints.clear()
    with pytest.raises(AssertionError):
        books.check()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 300), st.integers(0, 90), st.booleans(), st.sampled_from("slefk")),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 600),
)
def test_checkpoints_hold_under_any_sequence_of_prompts(steps: list[tuple[int, int, int, bool, str]], budget: int):
    """Prompts over few prefixes, evictions, failed restores: what is reused is a true prefix, bytes stay bounded."""
    books = forgetful(n_seq=3, n_cells=1500, budget=budget)
    busy: list[Loan] = []
    for family, shared, own, keep, event in steps:
        while not books.has_idle:
            books.give_back(busy.pop(0).slot)
        prompt = np.concatenate([run_of(family * 1000, shared), run_of(5000 + shared, own + 1)])
        loan = books.lend(prompt)
        assert np.array_equal(loan.slot.tokens.view, prompt[: loan.reused])
        assert loan.reused < len(prompt)
        if event == "f" and any(isinstance(op, Restore) for op in loan.ops):
            books.lost(loan.slot.seq)
        for end in [*range(64, len(prompt), 64), shared, len(prompt)]:
            if end <= loan.slot.n:
                continue
            while books.cells.free < end - loan.slot.n:
                if not books.evict(100):
                    books.give_back(busy.pop(0).slot)
            books.extend(loan.slot, prompt[loan.slot.n : end])
            if books.wants_checkpoint(loan.slot):
                books.keep_checkpoint(loan.slot, state(100))
            books.check()
        if event == "e":
            books.evict(own + 1)
        if event == "k":
            books.forget(loan.slot)
        books.check()
        busy.append(loan)
        if not keep:
            books.give_back(busy.pop().slot)
