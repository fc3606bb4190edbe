"""SavedPrefix: what comes back is what was saved, and nothing else ever comes back."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._errors import StateError
from llama_worker._identity import KVIdentity
from llama_worker._saved_prefix import FIXED_SIZE, SavedPrefix, head_size, parsed_head

states = st.binary(max_size=200).map(lambda data: np.frombuffer(data, np.uint8))
prints = st.binary(min_size=16, max_size=16)
adapters = st.lists(st.tuples(st.text(max_size=20), st.floats(-1e6, 1e6)), max_size=3)
rows = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=100).map(lambda ids: np.array(ids, np.int32))


@st.composite
def prefixes(draw: st.DrawFn) -> SavedPrefix:
    tokens = draw(rows)
    lengths = sorted(draw(st.sets(st.integers(1, len(tokens)), max_size=5)))
    checkpoints = tuple((length, draw(states)) for length in lengths)
    return SavedPrefix(draw(prints), tokens, draw(states), checkpoints, KVIdentity.of(draw(adapters)))


def small(n_tokens: int = 5) -> SavedPrefix:
    state = np.arange(40, dtype=np.uint8)
    return SavedPrefix(bytes(range(16)), np.arange(n_tokens, dtype=np.int32), state, ((2, state[:7]), (4, state[:9])))


def same(a: SavedPrefix, b: SavedPrefix) -> bool:
    return (
        (a.fingerprint, a.kv) == (b.fingerprint, b.kv)
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.state, b.state)
        and [n for n, _ in a.checkpoints] == [n for n, _ in b.checkpoints]
        and all(np.array_equal(x, y) for (_, x), (_, y) in zip(a.checkpoints, b.checkpoints, strict=True))
    )


@given(prefixes())
def test_what_comes_back_is_what_was_saved(saved: SavedPrefix):
    data = saved.to_bytes()
    assert len(data) == saved.n_bytes
    assert same(SavedPrefix.parsed(data), saved)


@given(prefixes())
def test_the_head_tells_everything_but_the_states(saved: SavedPrefix):
    """Also when no more than the head was read."""
    data = saved.to_bytes()
    head = parsed_head(data[: head_size(data[:FIXED_SIZE])])
    assert (head.fingerprint, head.kv, head.n_bytes) == (saved.fingerprint, saved.kv, len(data))
    assert np.array_equal(head.tokens, saved.tokens)
    assert head.checkpoints == tuple((length, len(state)) for length, state in saved.checkpoints)


def test_no_bit_can_be_another_one():
    """Each of them: of the head, the tokens, the states and the digests."""
    data = small().to_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StateError):
            SavedPrefix.parsed(flipped)


def test_a_head_alone_is_damaged_or_right():
    """Whoever only looks for a beginning goes by it, and reads nothing else."""
    data = small().to_bytes()[: head_size(small().to_bytes())]
    assert parsed_head(data).n_bytes == small().n_bytes
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StateError):
            parsed_head(flipped)


def test_no_byte_can_be_missing_or_too_many():
    data = small().to_bytes()
    for length in range(len(data)):
        with pytest.raises(StateError):
            SavedPrefix.parsed(data[:length])
    with pytest.raises(StateError):
        SavedPrefix.parsed(data + b"\0")


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_at_all_are_refused(data: bytes, begins_well: bool):
    with pytest.raises(StateError):
        SavedPrefix.parsed(small().to_bytes()[:FIXED_SIZE] + data if begins_well else data)


@pytest.mark.parametrize("at", range(FIXED_SIZE - 3))
def test_a_length_that_lies_makes_nobody_allocate(at: int):
    """Lengths are held against the bytes that are there before anything is read by them."""
    data = bytearray(small().to_bytes())
    data[at : at + 4] = b"\xff" * 4
    with pytest.raises(StateError):
        SavedPrefix.parsed(data)


@pytest.mark.parametrize("lengths", [(4, 2), (2, 2), (0, 2), (2, 6)])
def test_checkpoints_that_cannot_be_are_refused(lengths: tuple[int, ...]):
    """Although every digest is right: they would lead to places that the sequence does not have."""
    state = np.zeros(3, np.uint8)
    data = replace(small(), checkpoints=tuple((length, state) for length in lengths)).to_bytes()
    with pytest.raises(StateError, match="cannot be"):
        SavedPrefix.parsed(data)


@pytest.mark.parametrize(
    "loras",
    [(("b", 1.0), ("a", 1.0)), (("a", 0.0),), (("a", 0.1),), (("a", float("nan")),), (("a", 1e300),), (("a",),)],
)
def test_adapters_that_cannot_be_are_refused(loras: Any):
    """In another order, of no effect, with a scale that no C float has: they would be found by nobody, or by chance."""
    data = replace(small(), kv=KVIdentity(loras)).to_bytes()
    with pytest.raises(StateError, match="adapters"):
        SavedPrefix.parsed(data)


def test_no_tokens_are_no_prefix():
    with pytest.raises(StateError, match="cannot be"):
        SavedPrefix.parsed(replace(small(0), checkpoints=()).to_bytes())


def test_another_version_is_refused_by_its_name():
    data = bytearray(small().to_bytes())
    struct.pack_into("<H", data, 4, 2)
    with pytest.raises(StateError, match="version 1"):
        SavedPrefix.parsed(data)


def test_what_was_read_cannot_be_written_to():
    saved = SavedPrefix.parsed(bytearray(small().to_bytes()))
    with pytest.raises(ValueError):
        saved.state[0] = 1
