"""One llama_batch, allocated once and filled through numpy views."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_worker._engine.base import Span, TokenIds
from llama_worker._engine.library import Library


class Batch:
    """Rows for one llama_decode. Belongs to the thread of its engine."""

    def __init__(self, lib: Library, n_rows: int, n_seq: int) -> None:
        self._api = lib.api
        self.native = lib.api.llama_batch_init(n_rows, 0, 1)
        self._tokens = np.ctypeslib.as_array(self.native.token, shape=(n_rows,))
        self._positions = np.ctypeslib.as_array(self.native.pos, shape=(n_rows,))
        self._outputs = np.ctypeslib.as_array(self.native.logits, shape=(n_rows,))
        np.ctypeslib.as_array(self.native.n_seq_id, shape=(n_rows,))[:] = 1
        # Each row's seq_id is a pointer; rows point into one constant array instead of owning a cell.
        self._seq_pointers = _pointers(self.native.seq_id, n_rows)
        self._allocated = self._seq_pointers.copy()
        self._seq_ids = np.arange(n_seq, dtype=np.int32)
        self._seq_address = [self._seq_ids.ctypes.data + 4 * seq for seq in range(n_seq)]

    def fill(self, spans: Sequence[Span]) -> None:
        """Write the rows of `spans`, which have been checked."""
        row = 0
        for seq, start, tokens, output in spans:
            n = len(tokens)
            if n == 1:
                self._tokens[row] = tokens[0]
                self._positions[row] = start
                self._outputs[row] = output
                self._seq_pointers[row] = self._seq_address[seq]
                row += 1
                continue
            end = row + n
            self._tokens[row:end] = tokens
            self._positions[row:end] = np.arange(start, start + n, dtype=np.int32)
            self._outputs[row:end] = 0
            self._outputs[end - output : end] = 1
            self._seq_pointers[row:end] = self._seq_address[seq]
            row = end
        self.native.n_tokens = row

    def fill_texts(self, texts: Sequence[TokenIds]) -> None:
        """Write whole texts for pooling, text i as sequence i, every row an output."""
        row = 0
        for seq, tokens in enumerate(texts):
            end = row + len(tokens)
            self._tokens[row:end] = tokens
            self._positions[row:end] = np.arange(len(tokens), dtype=np.int32)
            self._outputs[row:end] = 1
            self._seq_pointers[row:end] = self._seq_address[seq]
            row = end
        self.native.n_tokens = row

    def free(self) -> None:
        """Give the memory back. The batch is of no use afterwards."""
        self._seq_pointers[:] = self._allocated  # llama_batch_free frees what each row points to
        self._api.llama_batch_free(self.native)


def _pointers(array: Any, n: int) -> NDArray[np.uintp]:
    address = ctypes.cast(array, ctypes.c_void_p).value
    assert address is not None
    cells = (ctypes.c_void_p * n).from_address(address)
    return np.frombuffer(memoryview(cells).cast("B"), dtype=np.uintp)
