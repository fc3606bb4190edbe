"""Copies are made where they pay, as far as that can be learnt."""

import numpy as np
import pytest

from llama_worker._prefix_cache import PrefixCache
from llama_worker._seq_ops import Save
from llama_worker._thrift import PROBE, Thrift
from tests.worker.test_prefix_cache import fill, ids, run_of, serve
from tests.worker.test_ram_tier import books, carry_out


def judge(*, decoding: float = 1e-3, saving: float = 1e-5, restoring: float = 1e-5) -> Thrift:
    """Times in seconds a token."""
    thrift = Thrift()
    thrift.decoding.observe(1000, 1000 * decoding)
    thrift.saving.observe(1000, 1000 * saving)
    thrift.restoring.observe(1000, 1000 * restoring)
    return thrift


def kept(thrift: Thrift, times: int, *, continued: bool = False) -> int:
    return sum(thrift.pays(continued=continued) for _ in range(times))


def test_until_the_costs_are_known_everything_is_saved():
    assert kept(Thrift(), 100) == 100


def test_copies_that_cost_more_than_decoding_are_not_made():
    assert kept(judge(saving=1e-3), 160) == 160 // PROBE
    assert kept(judge(restoring=1e-3), 160) == 160 // PROBE


def test_what_is_never_asked_for_is_no_longer_saved_but_now_and_then():
    thrift = judge()
    for _ in range(200):
        thrift.in_vain(continued=False)
    assert kept(thrift, 160) == 160 // PROBE
    assert kept(thrift, 160, continued=True) == 160, "conversations are judged apart"


def test_one_that_is_asked_for_brings_saving_back_where_decoding_is_dear():
    thrift = judge()
    for _ in range(300):
        thrift.in_vain(continued=False)
    thrift.asked_for(continued=False)
    assert kept(thrift, 10) == 10


def rounds(cache: PrefixCache, n: int, *, unique: bool) -> list[tuple[int, int]]:
    """Copies away and back of each of `n` rounds of 200 prompts, the same ones in turn or always others."""
    found = []
    for number in range(n):
        saved, hits = cache.tier.counts.saved, cache.tier.counts.hits
        for i in range(200):
            carry_out(cache, fill(cache, run_of(1000 * (i + unique * 200 * number), 200)).ops)
        found.append((cache.tier.counts.saved - saved, cache.tier.counts.hits - hits))
    return found


def test_a_flood_of_single_questions_is_hardly_copied():
    cache = books(n_cells=4096, budget=20 * 2000)
    cache.tier.thrift = judge(saving=1e-4)
    first, *_, last = rounds(cache, 4, unique=True)
    assert first[0] > 60
    assert last == (200 // PROBE, 0) or last == (200 // PROBE + 1, 0)


def test_sessions_in_turn_that_cannot_all_be_kept_cost_no_more_than_they_spare():
    """Room for 20 of 200: saving all would drop each before its turn; the few that are saved stay until then."""
    cache = books(n_cells=4096, budget=20 * 2000)
    cache.tier.thrift = judge(saving=1e-4)
    rounds(cache, 2, unique=False)
    away, back = np.sum(rounds(cache, 8, unique=False), axis=0)
    assert away * 1e-4 + back * 1e-5 < back * 1e-3
    assert away < 8 * 200 / 2


def test_who_is_preempted_is_saved_whatever_became_of_others():
    cache = books()
    cache.tier.thrift = judge(saving=1.0)
    loan = fill(cache, run_of(0, 300), give_back=False)
    assert Save in map(type, cache.take_away(loan.slot))


# --- what makes room


def cache(n_seq: int, n_cells: int = 4096) -> PrefixCache:
    return PrefixCache(n_seq=n_seq, n_cells=n_cells, can_trim=True, can_share=True)


def test_a_flood_of_single_questions_leaves_a_conversation_its_slot():
    books = cache(3)
    history = run_of(0, 200)
    for turn in range(4):
        fill(books, history)
        history = np.concatenate([history, run_of(200 + 30 * turn, 30)])
    for i in range(8):
        fill(books, run_of(5000 + 1000 * i, 200))
    assert fill(books, history).reused >= 280


def test_a_conversation_that_nobody_goes_on_with_does_not_stay_for_ever():
    books = cache(2)
    fill(books, run_of(0, 200))
    fill(books, run_of(0, 250))
    for i in range(60):
        fill(books, run_of(5000 + 1000 * i, 200))
    assert all(slot.n != 250 for slot in books.slots)


def test_the_slot_with_little_of_its_own_is_taken_first():
    """Of a long conversation and a newer one that has but a few tokens besides the shared prompt the latter goes."""
    books = cache(3)
    system = run_of(0, 300)
    long = fill(books, np.concatenate([system, run_of(1000, 500)]))
    short = fill(books, np.concatenate([system, run_of(2000, 20)]))
    fill(books, run_of(8000, 400))
    assert fill(books, run_of(9000, 50)).slot is short.slot
    assert long.slot.n == 800


def test_eviction_takes_what_costs_least_for_the_cells_that_are_asked_for():
    """Going back to a far checkpoint loses more than a near one, though it was used a little longer ago."""
    from tests.worker.test_prefix_cache import forgetful

    books = forgetful(n_seq=2)
    far = serve(books, run_of(0, 600), 100)
    near = serve(books, run_of(3000, 600), 580)
    (op,) = books.evict(20)
    assert (op.seq, near.slot.n, far.slot.n) == (near.slot.seq, 580, 600)


@pytest.mark.parametrize("turns", [0, 3])
def test_that_it_was_continued_is_forgotten_with_what_was_continued(turns: int):
    books = cache(1)
    for i in range(turns + 1):
        loan = fill(books, run_of(0, 100 + 40 * i))
    assert loan.slot.continued is (turns > 0)
    assert not fill(books, ids(7, 8, 9)).slot.continued
