"""NgramIndex: where the last words of a text have stood before, and what followed them there.

A table of fixed size leads from each run of three tokens to the place behind its latest occurrence. Runs that
fall on the same entry overwrite each other: then something is forgotten, but never mixed up, for what is found
is compared with what was looked for. A token is entered when the index is asked for the first time after it
came, so an index that nobody asks costs nothing.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llama_worker._tokens import TokenBuffer, TokenIds

N: Final = 3
"""Tokens of a run. Two are found too often by chance, four are found too late in a copied text."""

NOTHING: Final[TokenIds] = np.empty(0, np.int32)
_FEWEST_BITS: Final = 8
_MOST_BITS: Final = 18  # 1 MiB; a longer text forgets some of its oldest runs
_FACTORS: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_WORD: Final = 0xFFFFFFFF
_BULK: Final = 16  # so many new tokens are entered by numpy at once


class NgramIndex:
    """Over `tokens`, which only ever grow, to about `most` of them. Not thread-safe."""

    __slots__ = ("_n", "_shift", "_table", "_tokens")

    def __init__(self, tokens: TokenBuffer, most: int) -> None:
        bits = min(max((2 * most).bit_length(), _FEWEST_BITS), _MOST_BITS)
        self._shift = 32 - bits
        self._table: NDArray[np.int32] = np.zeros(1 << bits, np.int32)  # 0 is nowhere: a place is behind N tokens
        self._tokens = tokens
        self._n = N  # the place that is entered next, once there is a token at it

    @property
    def nbytes(self) -> int:
        return self._table.nbytes

    def propose(self, most: int) -> TokenIds:
        """At most `most` tokens that followed the last time; empty when it is new. O(1) for each token since.

        What was found just before the end goes on as it did there, in circles.
        """
        self._catch_up()
        tokens, n = self._tokens.view, self._tokens.n
        if n < N or most <= 0:
            return NOTHING
        last = tokens[n - N :]
        place = int(self._table[self._entry(*last.tolist())])
        if not place or tokens[place - N : place].tolist() != last.tolist():
            return NOTHING
        found = tokens[place : place + most]
        return found if len(found) == most else np.concatenate([found] * (most // len(found) + 1))[:most]

    def _catch_up(self) -> None:
        start, end = self._n, self._tokens.n
        if end - start >= _BULK:
            self._enter_many(start, end)
        else:
            tokens = self._tokens.part(start - N, end).tolist()
            for i, place in enumerate(range(start, end)):
                self._table[self._entry(*tokens[i : i + N])] = place
        self._n = max(start, end)

    def _enter_many(self, start: int, end: int) -> None:
        tokens = self._tokens.part(start - N, end).astype(np.uint32)
        runs = [tokens[i : i + end - start] for i in range(N)]
        self._table[self._entry(*runs)] = np.arange(start, end, dtype=np.int32)  # of equal entries the last one stays

    def _entry(self, a: Any, b: Any, c: Any) -> Any:
        """Where a run is entered: of three ints, or of three rows of uint32, which wrap by themselves."""
        mixed = (a * _FACTORS[0] & _WORD) ^ (b * _FACTORS[1] & _WORD) ^ (c * _FACTORS[2] & _WORD)
        return (mixed * _FACTORS[1] & _WORD) >> self._shift
