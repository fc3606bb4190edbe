"""Sealed states: what an engine's sequences held, as bytes that say what they are.

llama.cpp believes whatever it is given as a state: a buffer of another model or context, or one that is cut
off, is read as if it were right, and aborts the process or leaves a wrong cache. So each state carries a label
(which engine's, with which adapters, how many tokens, whole or partial) and a checksum, and nothing reaches C
unless all of it holds.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np

from llama_worker._engine.base import SavedState, StateError
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.log import collected_log, error_lines
from llama_worker._identity import BASE

_MAGIC: Final = b"LWS2"
# magic, partial, fingerprint, mark of the KVIdentity, length, bytes of the payload
_LABEL: Final = struct.Struct("<4s?3x16s16sIQ")
_SUM: Final = struct.Struct("<I")
_HEAD: Final = _LABEL.size + _SUM.size
_WHOLE: Final = 0
_PARTIAL_ONLY: Final = 1


@dataclass(frozen=True, slots=True)
class Opened:
    """A state that belongs to this engine: the first `length` tokens of a sequence, computed with what `kv` marks."""

    payload: SavedState
    length: int
    partial: bool
    kv: bytes = BASE.mark


def fingerprint(*parts: object) -> bytes:
    """16 bytes that differ where a state of the one could not be read as a state of the other."""
    return blake2b(repr(parts).encode(), digest_size=16).digest()


class Unsealed:
    """Room for a state of `n_bytes`, to be written to `payload` and then sealed."""

    def __init__(self, n_bytes: int) -> None:
        self._whole: SavedState = np.empty(_HEAD + n_bytes, np.uint8)
        self.payload = self._whole[_HEAD:]

    def sealed(self, mark: bytes, *, length: int, partial: bool, kv: bytes = BASE.mark) -> SavedState:
        """The state of an engine whose fingerprint is `mark`; it cannot be written to any more."""
        label = _LABEL.pack(_MAGIC, partial, mark, kv, length, len(self.payload))
        head = label + _SUM.pack(zlib.crc32(self.payload.data, zlib.crc32(label)))
        self._whole[:_HEAD] = np.frombuffer(head, np.uint8)
        self._whole.setflags(write=False)
        return self._whole


def opened(state: SavedState | bytes, mark: bytes) -> Opened:
    """What `state` holds. Raises StateError when it is damaged, or of an engine with another fingerprint."""
    data = np.frombuffer(state, np.uint8)
    if len(data) < _HEAD:
        raise StateError(f"a state of {len(data)} bytes is none")
    magic, partial, of, kv, length, size = _LABEL.unpack_from(data.data)
    (checksum,) = _SUM.unpack_from(data.data, _LABEL.size)
    payload = data[_HEAD:]
    if magic != _MAGIC or size != len(payload):
        raise StateError(f"a state of {len(data)} bytes is cut off, or none")
    if of != mark:
        raise StateError("the state is another model's, or of a context that keeps it in another form")
    if checksum != zlib.crc32(payload.data, zlib.crc32(data[: _LABEL.size].data)):
        raise StateError(f"the state of {length} tokens is damaged")
    return Opened(payload, length, partial, kv)


def kv_mark(state: SavedState | bytes) -> bytes:
    """The mark of the KVIdentity that `state` says it was computed with; of no meaning for what is no state."""
    data = np.frombuffer(state, np.uint8)
    return bytes(_LABEL.unpack_from(data.data)[3]) if len(data) >= _HEAD else b""


class ContextStates:
    """Saves and loads the sequences of one llama.cpp context. The engine's thread; the caller has checked ids."""

    def __init__(self, lib: Library, context: Pointer, mark: bytes) -> None:
        self._api, self._context, self._mark = lib.api, context, mark

    def save(self, seq: int, length: int, *, partial: bool, kv: bytes = BASE.mark) -> SavedState:
        """See `base.Engine.seq_save`."""
        flags = _PARTIAL_ONLY if partial else _WHOLE
        with collected_log() as lines:
            size = self._api.llama_state_seq_get_size_ext(self._context, seq, flags)
            room = Unsealed(size)
            address = room.payload.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            written = self._api.llama_state_seq_get_data_ext(self._context, address, size, seq, flags) if size else 0
        if not size or written != size:
            raise StateError(f"{length} tokens could not be saved: {error_lines(lines)}")
        return room.sealed(self._mark, length=length, partial=partial, kv=kv)

    def open(self, state: SavedState | bytes) -> Opened:
        """What `state` holds. Raises StateError unless it is one of this context's, and whole."""
        return opened(state, self._mark)

    def load(self, seq: int, state: Opened) -> None:
        """Put `state` into `seq`. Raises StateError; what `seq` holds is then undefined."""
        flags = _PARTIAL_ONLY if state.partial else _WHOLE
        size = len(state.payload)
        with collected_log() as lines:
            address = state.payload.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            read = self._api.llama_state_seq_set_data_ext(self._context, address, size, seq, flags)
        if read != size:
            raise StateError(f"{state.length} tokens could not be restored: {error_lines(lines)}")
