"""Boundaries: how many of a prompt's first tokens other prompts are likely to begin with too.

A model that cannot cut its state back is saved at such places. In a chat they are where something ends that
comes again word for word: what stands before the first message that is not the system's (instructions and
tools), before the last user message, and before the reply. The words that ask for it are in the next prompt too,
but for those that begin a thought. What follows is not stable: replies come back in another form, thoughts not at all.

Between them, and in prompts that are no chats, the places are one every so many tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from llama_worker._tokens import TokenIds

SPACING = 1024
"""Tokens between two boundaries where nothing is known of the prompt."""

LEAST = 64
"""A shorter raw prompt has no boundary: decoding it again is as quick as another step."""


def chat_boundaries(
    tokens: TokenIds, pieces: Sequence[bytes], n_before: Iterable[int], n_bytes: int
) -> tuple[int, ...]:
    """Boundaries of a chat of `tokens`, rendered as `n_bytes` of text, that is stable up to each of `n_before` bytes.

    `pieces` are the texts of the vocabulary. What a tokenizer adds or leaves out makes the places earlier, never later.
    """
    ends = np.cumsum([len(pieces[token]) for token in tokens.tolist()])
    places = {_place(ends, before, n_bytes) for before in n_before}
    return _spaced(place for place in places if 0 < place < len(tokens))


def raw_boundaries(n_tokens: int) -> tuple[int, ...]:
    """Boundaries of a prompt that is no chat: the last is one token before its end, for who asks it again."""
    return _spaced([n_tokens - 1]) if n_tokens >= LEAST else ()


def common_text(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def _place(ends: TokenIds, before: int, n_bytes: int) -> int:
    """How many tokens end within the first `before` bytes, counted from both ends of the text.

    One less, for a word that goes on behind the place may be cut into other tokens.
    """
    from_start = int(np.searchsorted(ends, before, side="right"))
    from_end = int(np.searchsorted(ends, int(ends[-1]) - (n_bytes - before), side="right"))
    return min(from_start, from_end) - 1


def _spaced(places: Iterable[int]) -> tuple[int, ...]:
    known = sorted(places)
    between = [at for low, high in pairwise([0, *known]) for at in range(low + SPACING, high - SPACING // 2, SPACING)]
    return tuple(sorted({*known, *between}))
