"""Outputs: the rows of logits that the last decode computed, where llama.cpp keeps them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from llama_worker._engine.base import Floats
from llama_worker._engine.library import Library, Pointer


class Outputs:
    """Views of a context's output buffer, by the rows of the batch. The engine's thread.

    llama.cpp aborts the process for a row without logits, so a row is looked up here first.
    """

    def __init__(self, lib: Library, context: Pointer, n_rows: int, n_vocab: int) -> None:
        self._lib, self._context = lib, context
        self._shape = n_rows, n_vocab
        self._rows: dict[int, Floats] = {}
        self._address = 0
        self._views: list[Floats] = []
        # A device computes on after llama_decode returns. Waiting for it gives the GIL up once more, which a
        # busy Python thread keeps for 5 ms; a CPU is done by then.
        self._is_async: bool = lib.api.llama_supports_gpu_offload()

    def forget(self) -> None:
        """The next call overwrites the logits, whatever comes of it."""
        self._rows = {}

    def take(self, rows: Sequence[int]) -> None:
        """A decode has computed logits for `rows` of its batch."""
        if rows:
            self._rows = dict(zip(rows, self._current(), strict=False))

    def row(self, row: int) -> Floats:
        """The logits of one row, to be read before the next decode. Raises ValueError when it has none."""
        logits = self._rows.get(row)
        if logits is None:
            raise ValueError(f"row={row}: the last decode computed logits for {sorted(self._rows)}")
        return logits

    def _current(self) -> list[Floats]:
        """Views of the output buffer: one row of logits for each output of the last decode, in its order."""
        if self._is_async:
            self._lib.api.llama_synchronize(self._context)
        address = self._lib.short.llama_get_logits(self._context)
        if address != self._address:
            self._address = address
            self._views = _views(address, *self._shape)
        return self._views


def _views(address: int, n_rows: int, n_vocab: int) -> list[Floats]:
    array = (ctypes.c_float * (n_rows * n_vocab)).from_address(address)
    return list(np.frombuffer(memoryview(array).cast("B"), dtype=np.float32).reshape(n_rows, n_vocab))
