"""TokenBuffer: a growing row of token ids, and the comparison that prefix reuse rests on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]


class TokenBuffer:
    """Token ids in one int32 array that doubles when full: appending is O(1), a view costs nothing."""

    __slots__ = ("_data", "n")

    def __init__(self, tokens: TokenIds | None = None) -> None:
        self._data: TokenIds = np.empty(max(64, 0 if tokens is None else len(tokens) + 64), np.int32)
        self.n = 0
        if tokens is not None:
            self.extend(tokens)

    def __len__(self) -> int:
        return self.n

    @property
    def view(self) -> TokenIds:
        """All ids, as a view that is valid until the next append."""
        return self._data[: self.n]

    def part(self, start: int, stop: int) -> TokenIds:
        return self._data[start:stop]

    def append(self, token: int) -> None:
        if self.n == len(self._data):
            self._grow(self.n + 1)
        self._data[self.n] = token
        self.n += 1

    def extend(self, tokens: TokenIds) -> None:
        end = self.n + len(tokens)
        if end > len(self._data):
            self._grow(end)
        self._data[self.n : end] = tokens
        self.n = end

    def truncate(self, length: int) -> None:
        self.n = min(self.n, length)

    def _grow(self, least: int) -> None:
        bigger = np.empty(max(least, 2 * len(self._data)), np.int32)
        bigger[: self.n] = self._data[: self.n]
        self._data = bigger


_FIRST_LOOK = 64
"""Most rows that differ do so early; the others are compared in ever longer pieces."""


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """The length of the longest common prefix of two rows of ids. Takes time by what they have in common."""
    m = min(len(a), len(b))
    if m == 0 or a[0] != b[0]:
        return 0
    start, end = 0, min(m, _FIRST_LOOK)
    while start < m:
        differ = a[start:end] != b[start:end]
        first = int(differ.argmax())
        if differ[first]:
            return start + first
        start, end = end, min(m, 4 * end)
    return m
