"""Sequences saved as bytes: what is restored goes on as if nothing had happened, and nothing foreign reaches C.

Which tier each kind of model allows, found by running this: restored is *bit-equal* to continued, whole and
partial, for plain attention (F32 weights with f16 KV, Q8_0 with q8_0 KV), full and dropping sliding windows,
recurrent and hybrid models, on a CPU, as long as the rows that follow are decoded in the same batches and the
restored cells lie in the order of positions (they do in a cache that has a free stretch). Where the batches
differ, it is the kernels that differ, as they do without any state: the numeric tier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_worker import ModelConfig
from llama_worker._engine.base import DecodeStatus, Engine, Floats, SavedState, Span, StateError, TokenIds
from llama_worker._engine.llama import load
from llama_worker.testing import FakeEngine, fake_limits

N = 300

MODELS = {
    "fake": ("", {}),
    "fake hybrid": ("", {}),
    "fake window": ("", {}),
    "llama": ("tiny_llama", {}),
    "llama q8": ("tiny_llama_q8", {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"}),
    "full window": ("tiny_swa", {}),
    "dropping window": ("tiny_swa", {"swa_full": False}),
    "recurrent": ("tiny_mamba", {}),
    "hybrid": ("tiny_lfm2", {}),
}
CHECKPOINTED = ["fake hybrid", "dropping window", "recurrent", "hybrid"]


def opened(request: pytest.FixtureRequest, kind: str, **changes: object) -> Engine:
    fixture, settings = MODELS[kind]
    given = {"n_ctx": 2048, "n_parallel": 4, "n_threads": 1, **settings, **changes}
    if fixture:
        return load(ModelConfig(model=str(request.getfixturevalue(fixture)), **given)).engine  # type: ignore[arg-type]
    limits = fake_limits(ModelConfig(model="fake://model", **given), hybrid=kind == "fake hybrid")  # type: ignore[arg-type]
    return FakeEngine(replace(limits, can_trim_restored=kind == "fake"))


@pytest.fixture(params=MODELS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = opened(request, request.param)
    yield engine
    engine.close()


@pytest.fixture(params=CHECKPOINTED)
def checkpointed(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = opened(request, request.param)
    yield engine
    engine.close()


def numbers(n: int, first: int = 20) -> TokenIds:
    return (first + np.arange(n, dtype=np.int32) * 7 % 200).astype(np.int32)


def fill(engine: Engine, tokens: TokenIds, seq: int = 0) -> None:
    for at in range(0, len(tokens), 100):
        chunk = tokens[at : at + 100]
        assert engine.decode([Span(seq, engine.seq_end(seq), chunk, False)]) is DecodeStatus.OK


def continued(engine: Engine, seq: int, n: int = 8, first: int = 30) -> Floats:
    """The logits of `n` more tokens, one by one."""
    rows = []
    for token in numbers(n, first):
        assert engine.decode([Span(seq, engine.seq_end(seq), np.array([token]), True)]) is DecodeStatus.OK
        rows.append(engine.logits(0).copy())
    return np.stack(rows)


def test_restored_equals_continued(engine: Engine):
    """Also in another sequence, and after the original is gone."""
    fill(engine, numbers(N))
    state = engine.seq_save(0)
    expected = continued(engine, 0)
    engine.seq_clear(0)
    engine.seq_restore(1, state, N)
    assert (engine.seq_end(0), engine.seq_end(1)) == (0, N)
    np.testing.assert_array_equal(continued(engine, 1), expected)
    engine.seq_restore(1, state, N)
    np.testing.assert_array_equal(continued(engine, 1), expected, err_msg="what it held meanwhile is replaced")


def test_a_token_too_few_or_too_many_would_be_noticed(engine: Engine):
    """The comparison can fail: a state of one token less, or one that differs in one token."""
    fill(engine, numbers(N))
    expected = continued(engine, 0)
    for tokens in (numbers(N - 1), np.append(numbers(N - 1), np.int32(7))):
        engine.seq_clear(0)
        fill(engine, tokens)
        engine.seq_restore(1, engine.seq_save(0), len(tokens))
        assert not np.array_equal(continued(engine, 1), expected)


def test_saving_changes_nothing(engine: Engine):
    fill(engine, numbers(N))
    expected = continued(engine, 0, 4)
    engine.seq_clear(0)
    fill(engine, numbers(N))
    rows = []
    for at in range(4):
        engine.seq_save(0)
        rows.append(continued(engine, 0, 1, first=30 + 7 * at)[0])
    np.testing.assert_array_equal(np.stack(rows), expected)


def test_other_sequences_do_not_notice(engine: Engine):
    fill(engine, numbers(N), 0)
    fill(engine, numbers(N, first=50), 2)
    state, expected = engine.seq_save(2), continued(engine, 2)
    engine.seq_restore(2, state, N)
    engine.seq_restore(1, engine.seq_save(0), N)
    np.testing.assert_array_equal(continued(engine, 2), expected)


def test_a_partial_state_leads_back_to_where_it_was_saved(checkpointed: Engine):
    fill(checkpointed, numbers(N))
    state = checkpointed.seq_save(0, partial=True)
    expected = continued(checkpointed, 0)
    fill(checkpointed, numbers(200, first=40))
    checkpointed.seq_restore(0, state, N)
    assert checkpointed.seq_end(0) == N
    np.testing.assert_array_equal(continued(checkpointed, 0), expected)


def test_a_partial_state_over_a_donors_cells_is_a_sequence_of_its_own(checkpointed: Engine):
    fill(checkpointed, numbers(N))
    state = checkpointed.seq_save(0, partial=True)
    expected = continued(checkpointed, 0)
    fill(checkpointed, numbers(200, first=40))
    end = checkpointed.seq_end(0)
    checkpointed.seq_restore(3, state, N, donor=0)
    assert (checkpointed.seq_end(3), checkpointed.seq_end(0)) == (N, end)
    np.testing.assert_array_equal(continued(checkpointed, 3), expected)


def test_the_donor_goes_on_undisturbed(checkpointed: Engine):
    fill(checkpointed, numbers(N))
    state = checkpointed.seq_save(0, partial=True)
    fill(checkpointed, numbers(100, first=40))
    expected = continued(checkpointed, 0)
    checkpointed.seq_clear(0)
    fill(checkpointed, numbers(N))
    fill(checkpointed, numbers(100, first=40))
    checkpointed.seq_restore(3, state, N, donor=0)
    continued(checkpointed, 3)
    checkpointed.seq_clear(3)
    np.testing.assert_array_equal(continued(checkpointed, 0), expected)


def test_an_aborted_sequence_goes_back_to_where_it_was_saved(checkpointed: Engine):
    """Half an update cannot be undone, but what was saved before it is as good as ever."""
    fill(checkpointed, numbers(N))
    state = checkpointed.seq_save(0, partial=True)
    expected = continued(checkpointed, 0)
    checkpointed.seq_restore(0, state, N)
    fill(checkpointed, numbers(50, first=40))
    aborted(checkpointed, 0)
    checkpointed.seq_restore(0, state, N)
    assert checkpointed.seq_end(0) == N
    np.testing.assert_array_equal(continued(checkpointed, 0), expected)


def test_an_aborted_sequence_starts_again_if_nothing_was_saved(checkpointed: Engine):
    fill(checkpointed, numbers(N))
    expected = continued(checkpointed, 0)
    aborted(checkpointed, 0)
    checkpointed.seq_clear(0)
    fill(checkpointed, numbers(N))
    np.testing.assert_array_equal(continued(checkpointed, 0), expected)


def aborted(engine: Engine, *seqs: int) -> None:
    engine.abort_flag.raise_()
    spans = [Span(seq, engine.seq_end(seq), numbers(20), True) for seq in seqs]
    assert engine.decode(spans) is DecodeStatus.ABORTED
    engine.abort_flag.clear()


def fill_three(engine: Engine) -> None:
    """The states of 0, 2 and 1 stand in this order: when 0 and 1 are decoded together, llama.cpp moves that of 2."""
    for seq in range(3):
        engine.seq_clear(seq)
    for seq in (0, 2, 1):
        fill(engine, numbers(N, first=20 + seq), seq)


def test_an_abort_of_several_leaves_no_other_with_a_wrong_state(engine: Engine):
    """llama.cpp notes that a state was moved before it is, and the abort comes between the two."""
    fill_three(engine)
    expected = continued(engine, 2)
    fill_three(engine)
    state = engine.seq_save(2, partial=engine.limits.needs_checkpoints)
    aborted(engine, 0, 1)
    if engine.seq_end(2) == 0:  # what is said to be lost can be gone back to
        engine.seq_restore(2, state, N)
    assert engine.seq_end(2) == N
    np.testing.assert_array_equal(continued(engine, 2), expected)


def test_an_abort_of_one_costs_no_other_anything(engine: Engine):
    fill_three(engine)
    expected = continued(engine, 2)
    fill_three(engine)
    aborted(engine, 1)
    assert engine.seq_end(2) == N
    np.testing.assert_array_equal(continued(engine, 2), expected)


def test_several_that_are_decoded_together_move_others_rightly(engine: Engine):
    fill_three(engine)
    expected = continued(engine, 2)
    fill_three(engine)
    spans = [Span(seq, N, numbers(20), True) for seq in (0, 1)]
    assert engine.decode(spans) is DecodeStatus.OK
    np.testing.assert_array_equal(continued(engine, 2), expected)


@pytest.mark.parametrize("kind", ["recurrent", "hybrid", "fake hybrid"])
def test_a_lost_state_is_neither_saved_nor_shared(request: pytest.FixtureRequest, kind: str):
    engine = opened(request, kind)
    fill_three(engine)
    state = engine.seq_save(2, partial=True)
    aborted(engine, 0, 1)
    for partial in (False, True):
        with pytest.raises(ValueError):
            engine.seq_save(2, partial=partial)
    with pytest.raises(StateError, match="lacks"):
        engine.seq_restore(3, state, N, donor=2)
    engine.close()


@pytest.mark.parametrize("kind", ["dropping window", "hybrid", "fake hybrid"])
def test_a_partial_state_without_the_other_cells_is_refused(request: pytest.FixtureRequest, kind: str):
    """llama.cpp would take it, and compute with cells that are not there."""
    engine = opened(request, kind)
    fill(engine, numbers(N))
    state = engine.seq_save(0, partial=True)
    engine.seq_clear(0)
    fill(engine, numbers(N - 1))
    for donor in (None, 1):
        with pytest.raises(StateError, match="lacks"):
            engine.seq_restore(0 if donor is None else 2, state, N, donor=donor)
    assert engine.seq_end(0) == 0
    engine.close()


def damaged(state: SavedState) -> dict[str, bytes]:
    whole = state.tobytes()
    cases = {"empty": b"", "a head": whole[:20], "cut off": whole[:-1], "longer": whole + b"\0"}
    for at in (0, 5, 12, 24, 30, 36, 41, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        cases[f"a bit at {at}"] = bytes(flipped)
    return cases


def test_a_damaged_state_never_reaches_the_engine(engine: Engine):
    """And leaves the sequence empty, ready to be used."""
    fill(engine, numbers(N))
    state, expected = engine.seq_save(0), continued(engine, 0)
    for what, bad in damaged(state).items():
        with pytest.raises(StateError):
            engine.seq_restore(1, bad, N)
        assert engine.seq_end(1) == 0, what
    engine.seq_restore(1, state.tobytes(), N)
    np.testing.assert_array_equal(continued(engine, 1), expected)


@pytest.mark.parametrize("length", [0, 1, N - 1, N + 1, -1])
def test_a_state_is_of_as_many_tokens_as_it_was_saved_of(engine: Engine, length: int):
    fill(engine, numbers(N))
    state = engine.seq_save(0)
    with pytest.raises(StateError, match=f"of {N} tokens, not of"):
        engine.seq_restore(1, state, length)


@pytest.mark.parametrize("kind", ["llama q8", "full window", "recurrent", "hybrid"])
def test_a_state_of_another_model_is_refused(request: pytest.FixtureRequest, kind: str):
    """Or of the same with another type of KV cells."""
    engine = opened(request, "llama")
    fill(engine, numbers(N))
    state = engine.seq_save(0)
    others = [opened(request, kind), opened(request, "llama", type_k="q8_0", type_v="q8_0", flash_attn="on")]
    for other in others:
        with pytest.raises(StateError, match="another model"):
            other.seq_restore(0, state, N)
        assert other.decode([Span(0, 0, numbers(5), True)]) is DecodeStatus.OK
        other.close()
    engine.close()


@pytest.mark.parametrize("kind", ["fake", "llama", "full window", "hybrid"])
def test_a_state_that_finds_no_room_leaves_the_sequence_empty(request: pytest.FixtureRequest, kind: str):
    engine = opened(request, kind, n_ctx=512)
    fill(engine, numbers(N), 0)
    expected = continued(engine, 0)
    engine.seq_clear(0)
    fill(engine, numbers(N), 0)
    state = engine.seq_save(0)
    with pytest.raises(StateError):
        engine.seq_restore(1, state, N)
    assert (engine.seq_end(0), engine.seq_end(1)) == (N, 0)
    np.testing.assert_array_equal(continued(engine, 0), expected)
    engine.close()


def test_misuse_is_refused_and_changes_nothing(engine: Engine):
    fill(engine, numbers(N))
    state = engine.seq_save(0)
    with pytest.raises(ValueError):
        engine.seq_save(1)
    with pytest.raises(ValueError):
        engine.seq_restore(0, state, N, donor=0)
    with pytest.raises(ValueError):
        engine.seq_restore(0, state, N, donor=1)
    if not engine.limits.needs_checkpoints:
        with pytest.raises(ValueError):
            engine.seq_save(0, partial=True)
    with pytest.raises(ValueError):
        state[0] = 1
    assert engine.seq_end(0) == N


@pytest.mark.parametrize(
    ("kind", "can_trim_restored", "needs_checkpoints"),
    [
        ("llama", True, False),
        ("full window", False, False),
        ("dropping window", False, True),
        ("recurrent", False, True),
        ("hybrid", False, True),
    ],
)
def test_the_memory_says_how_it_goes_back(
    request: pytest.FixtureRequest, kind: str, can_trim_restored: bool, needs_checkpoints: bool
):
    engine = opened(request, kind)
    limits = engine.limits
    assert limits.can_save
    assert (limits.can_trim_restored, limits.needs_checkpoints) == (can_trim_restored, needs_checkpoints)
    assert not (limits.can_trim and limits.needs_checkpoints)
    assert [engine.seq_end(seq) for seq in range(4)] == [0] * 4, "probing leaves nothing behind"
    engine.close()


@pytest.mark.parametrize("kind", ["full window", "fake window"])
def test_a_restored_window_is_no_longer_than_it_has_to_be(request: pytest.FixtureRequest, kind: str):
    """A window that was kept in full can be trimmed anywhere, but not once it was saved and restored."""
    engine = opened(request, kind)
    fill(engine, numbers(N))
    state = engine.seq_save(0)
    assert engine.seq_trim(0, 100)
    engine.seq_restore(1, state, N)
    assert not engine.seq_trim(1, 100)
    with pytest.raises(StateError):
        engine.seq_share(1, 2, 100)
    engine.seq_share(1, 2, N)
    assert engine.seq_end(2) == N
    engine.close()


def test_an_embedding_model_has_no_states(tiny_bert: Path):
    engine = load(ModelConfig(model=str(tiny_bert))).engine
    assert not engine.limits.can_save
    engine.close()
