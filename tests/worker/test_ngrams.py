"""The index of a text's own runs, against a search through all of it."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from llama_worker._ngrams import N, NgramIndex
from llama_worker._tokens import TokenBuffer

WORDS = st.integers(0, 3) | st.integers(0, 2**31 - 1)


def buffer_of(tokens: list[int]) -> TokenBuffer:
    return TokenBuffer(np.array(tokens, np.int32))


def searched(tokens: list[int], most: int) -> list[int]:
    """What followed the last N tokens where they stood before, latest place first."""
    for place in range(len(tokens) - 1, N - 1, -1):
        if tokens[place - N : place] == tokens[-N:]:
            followed = tokens[place:]
            return [followed[i % len(followed)] for i in range(most)]
    return []


def was_overwritten(index: NgramIndex, tokens: list[int]) -> bool:
    """Whether a later run than the one that `searched` finds fell on the same entry."""
    wanted = index._entry(*tokens[-N:])
    for place in range(len(tokens) - 1, N - 1, -1):
        if tokens[place - N : place] == tokens[-N:]:
            return False
        if index._entry(*tokens[place - N : place]) == wanted:
            return True
    return False


@given(st.lists(WORDS, max_size=60), st.lists(st.lists(WORDS, max_size=40), max_size=8), st.integers(0, 20))
def test_it_finds_what_a_search_finds(first: list[int], later: list[list[int]], most: int) -> None:
    """However the text grew in between, a token at a time or many, and however often it was asked."""
    buffer = buffer_of(first)
    index = NgramIndex(buffer, 500)
    for more in [[], *later]:
        buffer.extend(np.array(more, np.int32))
        tokens = buffer.view.tolist()
        expected = [] if len(tokens) < N or was_overwritten(index, tokens) else searched(tokens, most)
        assert index.propose(most).tolist() == expected
        assert index.propose(most).tolist() == expected


@given(st.lists(WORDS, min_size=N, max_size=300))
def test_what_is_forgotten_is_never_mixed_up(tokens: list[int]) -> None:
    """With the smallest table: what it proposes has followed the last tokens somewhere."""
    index = NgramIndex(buffer_of(tokens), 1)
    found = index.propose(1).tolist()
    behind = [tokens[i : i + 1] for i in range(N, len(tokens)) if tokens[i - N : i] == tokens[-N:]]
    assert found == [] or found in behind


def test_its_memory_is_bounded() -> None:
    assert NgramIndex(buffer_of([]), 10**9).nbytes == 1 << 20
    assert NgramIndex(buffer_of([]), 1000).nbytes <= 4 * 4 * 1024


def test_a_token_costs_the_same_in_a_long_text() -> None:
    def seconds(n: int) -> float:
        buffer = buffer_of(np.random.default_rng(0).integers(0, 30_000, n).tolist())
        index = NgramIndex(buffer, n + 3000)
        index.propose(8)
        times = []
        for _ in range(7):
            started = time.thread_time()
            for token in range(300):
                buffer.append(token % 11)
                index.propose(8)
            times.append(time.thread_time() - started)
        return min(times)

    assert seconds(100_000) < 3 * seconds(1000)
