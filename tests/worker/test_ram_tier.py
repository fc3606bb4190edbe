"""What eviction and preemption take away comes back by a copy: as it was, within a budget, and never in the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker import Message
from llama_worker._checkpoints import Checkpoint, Checkpoints
from llama_worker._engine.base import StateError
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._prefix_cache import PrefixCache
from llama_worker._ram_tier import RamTier
from llama_worker._seq_ops import Clear, Restore, Save, Trim
from llama_worker._snapshots import cache_metrics_of
from llama_worker.testing import Fault
from tests.worker.test_checkpoints import MODELS, Run, user
from tests.worker.test_going_back import alone, opened
from tests.worker.test_prefix_cache import ids, run_of, serve, state

KINDS = ["plain", "window", "hybrid"]
WORDS = "what was said about it before " * 10


def tier(budget: int = 10_000, *, can_trim: bool = True) -> RamTier:
    return RamTier(budget, Checkpoints(0), can_trim=can_trim)


def books(kind: str = "plain", n_seq: int = 1, n_cells: int = 4096, budget: int = 100_000) -> PrefixCache:
    return PrefixCache(
        n_seq=n_seq,
        n_cells=n_cells,
        can_trim=kind != "hybrid",
        can_share=kind != "hybrid",
        needs_checkpoints=kind == "hybrid",
        can_save=True,
        can_trim_restored=kind == "plain",
        budget=budget,
    )


def carry_out(cache: PrefixCache, ops: object) -> list[object]:
    """As the loop does; the states are of 1,000 bytes."""
    for op in ops:  # type: ignore[attr-defined]
        if isinstance(op, Save):
            cache.keep_saved(op, state(1000))
    cache.check()
    return [type(op) for op in ops]  # type: ignore[attr-defined]


# --- the tier itself


@pytest.mark.parametrize("back", [False, True])
def test_a_beginning_stays_where_its_continuation_cannot_be_cut_to_it(back: bool):
    saved = tier(can_trim=False)
    checkpoints = (Checkpoint(200, state(), 1),) if back else ()
    saved.put(Entry(run_of(0, 200), state(), (), 1))
    saved.put(Entry(run_of(0, 300), state(), checkpoints, 2))
    assert saved.find(np.concatenate([run_of(0, 200), run_of(900, 50)]))[1] == 200
    assert len(saved.entries) == (1 if back else 2)
    saved.check()


@pytest.mark.parametrize("back", [False, True])
def test_a_beginning_is_saved_where_no_continuation_can_be_cut_to_it(back: bool):
    saved = tier(can_trim=False)
    saved.put(Entry(run_of(0, 300), state(), (Checkpoint(200, state(), 1),) if back else (), 1))
    assert saved.wants(run_of(0, 200)) is not back


def test_what_eviction_leaves_of_a_saved_sequence_is_not_saved_too():
    """A window cannot be cut once it is restored, so the whole does not lead to what is left of it."""
    cache = books("window")
    serve(cache, run_of(0, 400))
    saves = [carry_out(cache, cache.evict(2)).count(Save) for _ in range(3)]
    serve(cache, np.concatenate([run_of(0, 394), run_of(900, 100)]))
    again = carry_out(cache, cache.evict(2)).count(Save)
    assert (saves, again) == ([1, 0, 0], 1)


def test_the_longest_beginning_is_found():
    saved = tier()
    saved.put(Entry(run_of(0, 200), state(), (), 1))
    saved.put(Entry(np.concatenate([run_of(0, 150), run_of(900, 100)]), state(), (), 2))
    entry, length = saved.find(np.concatenate([run_of(0, 150), run_of(900, 60), ids(7)]))
    assert (entry, length) == (saved.entries[1], 210)
    assert saved.find(run_of(0, 200)) == (saved.entries[0], 199)
    assert saved.find(run_of(5000, 10)) == (None, 0)


def test_what_cannot_be_trimmed_is_found_whole_or_at_a_checkpoint():
    saved = tier(can_trim=False)
    saved.put(Entry(run_of(0, 200), state(), (Checkpoint(80, state(), 1), Checkpoint(160, state(), 1)), 1))
    lengths = [saved.find(np.concatenate([run_of(0, common), ids(7, 8)]))[1] for common in (79, 80, 159, 160, 199, 200)]
    assert lengths == [0, 80, 80, 160, 160, 200]


def test_a_longer_sequence_replaces_what_is_a_beginning_of_it():
    saved = tier()
    saved.put(Entry(run_of(0, 200), state(), (), 1))
    assert not saved.wants(run_of(0, 200))
    assert not saved.wants(run_of(0, 150))
    assert saved.wants(run_of(0, 201))
    saved.put(Entry(run_of(0, 300), state(), (), 2))
    assert [entry.n for entry in saved.entries] == [300]
    saved.check()


def test_the_oldest_make_room():
    saved = tier(4000)
    for now in range(5):
        saved.put(Entry(run_of(1000 * now, 200), state(500), (), now))
        saved.check()
    assert [int(entry.tokens[0]) for entry in saved.entries] == [2000, 3000, 4000]
    assert saved.counts.dropped == 2


def test_short_sequences_and_those_that_would_not_fit_are_not_wanted():
    saved = tier(4000)
    assert not saved.wants(run_of(0, WORTH_SAVING - 1))
    saved.put(Entry(run_of(0, 200), state(2000), (), 1))
    assert not saved.wants(run_of(5000, 1000)), "learnt from the last one: ten bytes a token"
    assert not tier(0).wants(run_of(0, 500))


def test_checkpoints_come_first():
    checkpoints = Checkpoints(3000)
    saved = RamTier(3000, checkpoints, can_trim=False)
    saved.put(Entry(run_of(0, 200), state(2000), (), 1))
    checkpoints.hold([Checkpoint(10, state(500), 1)])
    saved.fit()
    assert saved.entries == []


# --- the books


def test_a_slot_that_is_needed_is_saved_first_and_comes_back():
    cache = books()
    carry_out(cache, serve(cache, run_of(0, 300)).ops)
    assert carry_out(cache, serve(cache, run_of(5000, 300)).ops) == [Save, Clear]
    loan = cache.lend(run_of(0, 350))
    assert carry_out(cache, loan.ops) == [Save, Clear, Restore]
    assert loan.reused == loan.slot.n == 300
    assert cache.tier.counts.hits == 1


def test_a_restored_slot_is_cut_to_what_is_common():
    cache = books()
    carry_out(cache, serve(cache, run_of(0, 300)).ops)
    carry_out(cache, serve(cache, run_of(5000, 300)).ops)
    loan = cache.lend(np.concatenate([run_of(0, 250), ids(7)]))
    assert carry_out(cache, loan.ops) == [Save, Clear, Restore, Trim]
    assert loan.reused == loan.slot.n == 250


def test_a_restored_window_is_of_use_whole_only_and_cannot_be_cut():
    cache = books("window")
    carry_out(cache, serve(cache, run_of(0, 300)).ops)
    carry_out(cache, serve(cache, run_of(5000, 300)).ops)
    assert cache.lend(np.concatenate([run_of(0, 250), ids(7)])).reused == 0
    cache = books("window")
    carry_out(cache, serve(cache, run_of(0, 300)).ops)
    carry_out(cache, serve(cache, run_of(5000, 300)).ops)
    loan = serve(cache, run_of(0, 350))
    assert carry_out(cache, loan.ops)[-1] is Restore
    assert (loan.reused, loan.slot.firm) == (300, 300)
    assert cache.match(np.concatenate([run_of(0, 299), ids(7)])) == (None, 0)
    assert cache.match(np.concatenate([run_of(0, 310), ids(7)]))[1] == 310


def test_a_sequence_with_checkpoints_is_saved_with_them():
    cache = books("hybrid")
    carry_out(cache, serve(cache, run_of(0, 300), 100, 200).ops)
    carry_out(cache, serve(cache, run_of(5000, 300)).ops)
    assert cache.checkpoints.n == 0
    loan = cache.lend(np.concatenate([run_of(0, 250), ids(7)]))
    assert carry_out(cache, loan.ops) == [Save, Clear, Restore, Restore]
    assert [op.length for op in loan.ops if isinstance(op, Restore)] == [300, 200]
    assert [checkpoint.length for checkpoint in loan.slot.checkpoints] == [100, 200]


def test_what_another_slot_holds_as_well_is_not_saved():
    cache = books(n_seq=2)
    serve(cache, run_of(0, 300))
    donor = serve(cache, run_of(0, 400), give_back=False)
    assert donor.reused == 300
    donor.slot.busy = False
    loan = cache.lend(np.concatenate([run_of(0, 250), run_of(900, 10)]))
    assert Save not in carry_out(cache, loan.ops)


def test_eviction_saves_once_however_often_it_nibbles():
    cache = books(n_seq=2)
    serve(cache, run_of(0, 400))
    seen = [carry_out(cache, cache.evict(10)) for _ in range(5)]
    assert seen == [[Save, Trim], *[[Trim]] * 4]


def test_what_is_not_there_whole_for_lack_of_cells_is_decoded():
    cache = books(n_seq=2, n_cells=600)
    carry_out(cache, serve(cache, run_of(0, 400)).ops)
    busy = serve(cache, run_of(5000, 150), give_back=False)
    carry_out(cache, cache.evict(10_000))
    serve(cache, run_of(7000, 300), give_back=True)
    busy2 = cache.lend(run_of(7000, 310))
    cache.extend(busy2.slot, run_of(7300, 10))
    assert not cache.has_idle
    cache.give_back(busy.slot)
    loan = cache.lend(run_of(0, 420))
    assert loan.reused == 0
    cache.check()


def test_check_notices_bytes_that_nobody_counts():
    cache = books()
    carry_out(cache, serve(cache, run_of(0, 300)).ops)
    carry_out(cache, serve(cache, run_of(5000, 300)).ops)
    cache.tier.n_bytes += 1
    with pytest.raises(AssertionError):
        cache.check()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400), st.integers(0, 90), st.booleans(), st.booleans())),
    st.sampled_from([0, 3000, 50_000]),
)
def test_books_hold_with_a_tier_beneath(kind: str, steps: list[tuple[int, int, int, bool, bool]], budget: int):
    cache = books(kind, n_seq=2, n_cells=1500, budget=budget)
    for family, shared, own, fails, preempted in steps:
        prompt = np.concatenate([run_of(family * 1000, shared), run_of(5000 + shared, own + 1)])
        loan = cache.lend(prompt)
        assert np.array_equal(loan.slot.tokens.view, prompt[: loan.reused])
        carry_out(cache, loan.ops)
        if fails and Restore in map(type, loan.ops):
            cache.lost(loan.slot.seq)
        for end in [*range(64, len(prompt), 64), len(prompt)]:
            if end <= loan.slot.n:
                continue
            while cache.cells.free < end - loan.slot.n:
                freeing = cache.evict(100)
                assert freeing
                carry_out(cache, freeing)
            cache.extend(loan.slot, prompt[loan.slot.n : end])
            if cache.wants_checkpoint(loan.slot):
                cache.keep_checkpoint(loan.slot, state(100))
            cache.check()
        if preempted:
            carry_out(cache, cache.take_away(loan.slot))
        cache.give_back(loan.slot)
        assert cache.tier.n_bytes + cache.checkpoints.n_bytes <= budget


# --- at work on the fake


@pytest.mark.parametrize("kind", KINDS)
def test_more_sessions_than_slots_come_back_without_a_prefill(kind: str):
    bench = opened(kind, n_parallel=2)
    histories = [[Message(role="user", content=f"{i} " + WORDS)] for i in range(6)]
    for history in histories:
        sink, _ = bench.ask(history)
        bench.settle(sink)
        history.append(Message(role="assistant", content=sink.text))
    for history in histories:
        history.append(user("and?"))
        before, known = bench.engine.n_rows, sum(len(message.content) for message in history[:2])
        sink, _ = bench.ask(history)
        bench.settle(sink)
        assert sink.text == alone(history)
        assert sink.terminal.usage.cached_tokens >= known
        assert bench.engine.n_rows - before < 100
    cache = cache_metrics_of(bench.service)
    assert cache.saved_hits >= 4
    assert cache.saved >= 4
    assert cache.saved_bytes > 0
    assert cache.restored_tokens > 4 * len(WORDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_preempted_generation_goes_on_from_where_it_was(kind: str):
    """Three that need 3 x 400 cells share 900: those that lose their slots decode no token twice."""
    bench = opened(kind, n_ctx=900, n_parallel=3)
    prompts = [f"{i}" * 200 for i in range(3)]
    sinks = [bench.ask(prompt, max_tokens=200, ignore_eos=True)[0] for prompt in prompts]
    bench.settle(*sinks)
    assert bench.service.meter.preemptions > 0
    assert bench.engine.n_rows < 3 * 401 + 30
    roomy = opened("plain", n_ctx=4096, n_parallel=3)
    expected = [roomy.ask(prompt, max_tokens=200, ignore_eos=True)[0] for prompt in prompts]
    roomy.settle(*expected)
    assert [sink.text for sink in sinks] == [sink.text for sink in expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["seq_save", "seq_restore"])
@pytest.mark.parametrize("how", [StateError("no room"), MemoryError("no memory is left")], ids=["state", "memory"])
def test_no_request_is_lost_when_states_fail(kind: str, call: str, how: Exception):
    faults = [Fault(call, how, nth) for nth in range(1, 200)]  # type: ignore[arg-type]
    bench = opened(kind, n_ctx=900, n_parallel=2, faults=faults)
    prompts = [f"{i} " + WORDS for i in range(5)]
    texts = []
    for more in ("", " and more"):
        sinks = [bench.ask(prompt + more, max_tokens=1, ignore_eos=True)[0] for prompt in prompts]
        bench.settle(*sinks)
        texts += [sink.text for sink in sinks]
    roomy = opened("plain", n_parallel=10)
    expected = [roomy.ask(p + more, max_tokens=1, ignore_eos=True)[0] for more in ("", " and more") for p in prompts]
    roomy.settle(*expected)
    assert texts == [sink.text for sink in expected]
    assert cache_metrics_of(bench.service).state_failures > 0


def test_a_window_that_was_dropped_for_want_of_cells_is_decoded_again():
    """llama.cpp overwrites what no token attends to any more; then a sequence can be cut, or shared, nowhere before."""
    bench = opened("plain", n_parallel=2)
    first, _ = bench.ask(WORDS + "one")
    bench.settle(first)
    bench.engine._firm[:] = [len(WORDS) + 4] * 2
    again, _ = bench.ask(WORDS[:200] + "two")
    bench.settle(again)
    sharing = [bench.ask(WORDS[:200] + other, max_tokens=40, ignore_eos=True)[0] for other in ("three", "four")]
    bench.engine._firm[:] = [10_000] * 2
    bench.settle(*sharing)
    fresh = opened("plain", n_parallel=1)
    expected = [fresh.ask(WORDS[:200] + other, max_tokens=40, ignore_eos=True)[0] for other in ("three", "four")]
    expected.append(fresh.ask(WORDS[:200] + "two")[0])
    fresh.settle(*expected)
    assert [sink.text for sink in (*sharing, again)] == [sink.text for sink in expected]
    assert cache_metrics_of(bench.service).state_failures > 0


# --- at work on llama.cpp


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> Iterator[object]:
    opened_runs: list[Run] = []

    def open_run(kind: str, mistake: object = None, **config: object) -> Run:
        fixture, given = MODELS[kind]
        opened_runs.append(Run(request.getfixturevalue(fixture), mistake, **given, **config))  # type: ignore[arg-type]
        return opened_runs[-1]

    yield open_run
    for run in opened_runs:
        run.bench.shut_down()


@pytest.mark.engine
@pytest.mark.parametrize("mistake", [None, "shifted after restore"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_session_that_had_lost_its_slot_goes_on_as_if_it_had_not(kind: str, mistake: object, runs):
    """Bit-equal where the batches are the same: the tokens of the next turn are decoded after the same cells."""
    history = "river stone lamp " * 100 + "river"
    logits = []
    for sessions in (0, 3):
        run = runs(kind, mistake, n_parallel=2)
        first = run.answer(history, n=1)
        for i in range(sessions):
            run.answer(f"{i} " + "garden water " * 100)
        before = run.prefilled
        sink = run.answer(history + " lamp garden" * 10)
        assert sink.terminal.usage.cached_tokens >= first.terminal.usage.prompt_tokens
        assert run.prefilled - before == 20
        assert cache_metrics_of(run.bench.service).saved_hits == bool(sessions)
        logits.append(run.logits())
    assert np.array_equal(*logits) is (mistake is None)
