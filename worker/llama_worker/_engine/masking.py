"""Choosing under a mask: which tokens it leaves, and the row of logits, or the candidates, without the others.

A mask has one bit for each token: bit i of byte j is token 8j+i, set where it is allowed. Inside a JSON
document it leaves a handful of tokens, inside a string or free text nearly all. A handful is looked at by
itself: a chain over 20 candidates costs less than one over 50,000 of which all but 20 are minus infinity, and
samplers that take logarithms of probabilities compute nonsense of a zero. Otherwise the row is masked in place.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llama_worker._engine.base import Floats, Mask
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.rows import require_number
from llama_worker._errors import GenerationError

Tokens: TypeAlias = NDArray[np.intp]

_FEW: Final = 256  # bytes of a mask with a bit in them, so at most eight times as many tokens
_BITS: Final = np.arange(8, dtype=np.intp)
_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def _table() -> Floats:
    """What each byte of a mask adds to its eight logits: nothing, or minus infinity."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(0), np.float32(-np.inf))


class Masks:
    """Applies masks to the rows of one context. The engine's thread; its buffers serve one row at a time."""

    def __init__(self, lib: Library, n_vocab: int) -> None:
        self._lib = lib
        self._n_vocab = n_vocab
        self._n_bytes = (n_vocab + 7) // 8
        # Bits behind the last token count for nothing, whoever set them.
        self._every: Mask = np.packbits(np.ones(n_vocab, np.uint8), bitorder="little")
        self._left: Mask = np.empty(self._n_bytes, np.uint8)
        self._table = _table()
        self._added: Floats = np.empty((self._n_bytes, 8), np.float32)
        self._flat: Floats = self._added.reshape(-1)[:n_vocab]
        self._candidates: NDArray[Any] = np.zeros(n_vocab, _CANDIDATE)
        self._first = self._candidates.ctypes.data_as(ctypes.POINTER(lib.api.llama_token_data))
        self._array = lib.api.llama_token_data_array(self._first, 0, -1, False)
        self._pointer = ctypes.pointer(self._array)

    def permitted(self, banned: frozenset[int]) -> Mask:
        """Every token but the banned ones, as a mask."""
        bits = np.unpackbits(self._every, bitorder="little")
        bits[list(banned)] = 0
        return np.packbits(bits, bitorder="little")

    def narrow(self, mask: Mask, permitted: Mask | None) -> Tokens | None:
        """The tokens that both leave, ascending, if they are few; else None, and `apply` and `leaves` go on.

        Raises ValueError for a mask of another vocabulary; GenerationError when nothing is left.
        """
        if mask.dtype != np.uint8 or mask.shape != (self._n_bytes,):
            raise ValueError(f"mask: {mask.dtype} of shape {mask.shape}, must be uint8 of ({self._n_bytes},)")
        left = np.bitwise_and(mask, self._every if permitted is None else permitted, out=self._left)
        (where,) = left.nonzero()
        if not len(where):
            raise nothing_left()
        if len(where) > _FEW:
            return None
        rows, columns = np.unpackbits(left[where, None], axis=1, bitorder="little").nonzero()
        return where[rows] * 8 + _BITS[columns]

    def everything(self) -> Tokens:
        """All tokens that `narrow` found to be many."""
        return np.unpackbits(self._left, count=self._n_vocab, bitorder="little").nonzero()[0]

    def apply(self, logits: Floats) -> None:
        """Take what `narrow` did not leave out of a row of finite logits, in place."""
        np.take(self._table, self._left, axis=0, out=self._added, mode="clip")
        np.add(logits, self._flat, out=logits)

    def leaves(self, token: int) -> bool:
        """Whether `narrow` left `token`."""
        return bool(self._left[token >> 3] >> (token & 7) & 1)

    def greatest(self, logits: Floats, tokens: Tokens) -> int:
        """The token with the greatest logit. Raises GenerationError when that is no number."""
        token = int(tokens[logits[tokens].argmax()])
        require_number(logits[token])
        return token

    def sample(self, chain: Pointer, logits: Floats, tokens: Tokens) -> int:
        """What `chain` chooses among `tokens`, and accepts. Raises GenerationError when it chooses nothing."""
        n = len(tokens)
        chosen = logits[tokens]
        require_number(np.maximum.reduce(chosen))  # NaN is the greatest; sorting it is undefined in C++
        candidates = self._candidates[:n]
        candidates["id"], candidates["logit"], candidates["p"] = tokens, chosen, 0.0
        array = self._array
        # XTC moves `data` on to what it leaves.
        array.data, array.size, array.selected, array.sorted = self._first, n, -1, False
        self._lib.short.llama_sampler_apply(chain, self._pointer)
        if not 0 <= array.selected < array.size <= n:
            raise nothing_left()
        token = int(array.data[array.selected].id)
        self._lib.short.llama_sampler_accept(chain, token)
        return token


def nothing_left() -> GenerationError:
    return GenerationError(
        "no token was left to choose; loosen logit_bias, ignore_eos, dry_multiplier, or what the reply must be"
    )
